"""`lora example`: write example data that come with the package."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from lora.cli.flags.from_fields import DATA
from lora.data.reading.orders import Part
from lora.terminal import print_line, print_note


def example(
    name: Annotated[str | None, Parameter(group=DATA)] = None,
    *,
    part: Annotated[Part, Parameter(group=DATA)] = "train",
    rows: Annotated[int | None, Parameter(group=DATA)] = None,
    seed: Annotated[int, Parameter(group=DATA)] = 0,
) -> int:
    """Write example data to standard output; without a name, list them.

    For example:

        lora example
        lora example orders > orders.jsonl
        lora example orders --part test > test.jsonl

    Names and phrasings of the test and validation parts never occur in training.

    Parameters
    ----------
    name
        orders, tickets or tools.
    part
        Part of the data.
    rows
        Number of rows. Default: a few hundred for training, a few dozen else.
    seed
        Random seed of the rows.
    """
    from lora.data.examples.catalogue import EXAMPLES, example_text, find_example
    from lora.errors import ConfigError

    if name is None:
        if rows is not None or seed != 0 or part != "train":
            raise ConfigError(
                f"Cannot list the example data with --part, --rows or --seed. Name the data: "
                f"{', '.join(EXAMPLES)}."
            )
        for each, data in EXAMPLES.items():
            print_line(f"{each:<8} {data.text}")
        print_line("\nlora example orders > orders.jsonl")
        return 0
    sys.stdout.write(example_text(name, part, rows, seed))
    if part == "train" and not sys.stdout.isatty():
        file = f"{name}{find_example(name).suffix}"
        print_note(f"next: lora finetune {file}{find_example(name).flags} --name {name}")
    return 0
