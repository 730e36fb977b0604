"""`lora convert-config`: another tool's configuration file as settings of lora finetune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lora.cli.flags.from_fields import MODEL, OUTPUT
from lora.cli.flags.shared import Overwrite, check_overwrite
from lora.cli.flags.yaml_file import read_settings
from lora.runs.outputs import OutputPath
from lora.terminal import print_note


def convert_config(
    path: Annotated[Path, Parameter(group=MODEL)],
    *,
    out: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    overwrite: Overwrite = False,
) -> int:
    """Convert a YAML file of axolotl, LLaMA-Factory or torchtune.

    For example:

        lora convert-config axolotl.yml --out run.yaml
        lora finetune run.yaml

    The tool is recognized by its keys. Each key is listed: what it becomes, why
    nothing is needed, or that it has no equivalent here and what to do. The tool's
    own defaults are written where ours differ.

    Parameters
    ----------
    path
        YAML file of the other tool.
    out
        YAML file to write. Default: print it.
    """
    from lora.conversion.axolotl import AXOLOTL
    from lora.conversion.convert import convert_settings
    from lora.conversion.converted_file import report_lines, yaml_text
    from lora.conversion.llama_factory import LLAMA_FACTORY
    from lora.conversion.torchtune import TORCHTUNE, without_interpolation

    check_overwrite(overwrite, out, "--out")
    output = None if out is None else OutputPath(out, inputs=(path,), overwrite=overwrite)
    if output is not None:
        output.check()
    keys = {name.replace("-", "_"): value for name, value in read_settings(path).items()}
    tools = (AXOLOTL, LLAMA_FACTORY, TORCHTUNE)
    found = convert_settings(without_interpolation(keys), tools, finetune_settings())
    text = yaml_text(found, path.name)
    for line in report_lines(found):
        print_note(line)
    if output is None:
        print(text, end="")
        return 0
    with output.building() as part:
        part.write_text(text, encoding="utf-8")
    print_note(f"wrote {output.path}: lora finetune {output.path}")
    return 0


def finetune_settings() -> tuple[str, ...]:
    """Return the settings of `lora finetune` in the order of its help, names with underscores."""
    from lora.cli import arguments_of

    names = (argument.name.removeprefix("--") for argument in arguments_of("finetune"))
    return tuple(name.replace("-", "_") for name in names if name != "*")
