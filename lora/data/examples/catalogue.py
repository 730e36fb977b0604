"""The example data by name, and their text as a file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from lora.data.examples.tickets import make_tickets
from lora.data.examples.tools import make_tool_chats
from lora.data.reading.orders import Part, make_orders
from lora.errors import ConfigError, did_you_mean

PARTS: tuple[Part, ...] = get_args(Part)
MAX_ROWS = 10_000
"""Of one call: far more than the word lists have."""


@dataclass(frozen=True)
class ExampleData:
    """One set of example data."""

    text: str
    """What it is, in a line."""
    suffix: str
    """Of a file: .jsonl or .csv."""
    make: Callable[[Part, int, int], list[dict[str, Any]]]
    """(part, rows, seed) -> rows."""
    n_rows: dict[str, int]
    """By part: rows, unless another number is asked for."""
    flags: str = ""
    """What `lora finetune` needs beside the file, with the default model."""


EXAMPLES = {
    "orders": ExampleData(
        "order notes, and the JSON that they describe (chats): extraction",
        ".jsonl",
        make_orders,
        {"train": 300, "validation": 16, "test": 40},
        " --steps 75 --batch-size 4 --learning-rate 2e-3 --max-length 192",
    ),
    "tickets": ExampleData(
        "support tickets and their team (CSV with text and label): classification",
        ".csv",
        make_tickets,
        {"train": 200, "validation": 24, "test": 40},
        " --max-length 256",
    ),
    "tools": ExampleData(
        "questions that the assistant answers by calling a tool (chats with tools)",
        ".jsonl",
        make_tool_chats,
        {"train": 120, "validation": 12, "test": 24},
        " --chat-template smollm2-tools --max-length 768",
    ),
}
"""By name."""


def find_example(name: str) -> ExampleData:
    """Return the example data called `name`. Raises ConfigError for an unknown name."""
    if name not in EXAMPLES:
        raise ConfigError(
            f"Cannot find example data called {name!r}.{did_you_mean(name, EXAMPLES)} Allowed: "
            f"{', '.join(EXAMPLES)}. See them with: lora example"
        )
    return EXAMPLES[name]


def example_text(name: str, part: Part = "train", rows: int | None = None, seed: int = 0) -> str:
    """Return example data as the text of a file; the same arguments give the same text.

    Raises ConfigError for an unknown name or part, and for more rows than there are.
    """
    example = find_example(name)
    if part not in PARTS:
        near = did_you_mean(str(part), PARTS)
        raise ConfigError(f"Cannot use part={part!r}. Allowed: {', '.join(PARTS)}.{near}")
    count = example.n_rows[part] if rows is None else rows
    if not 1 <= count <= MAX_ROWS:
        raise ConfigError(f"Cannot make {count} rows. Allowed: 1 to {MAX_ROWS:,}.")
    made = example.make(part, count, seed)
    if example.suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(made[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(made)
    return out.getvalue()
