"""`lora report`: one page with curves and tables from run directories."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lora.cli.flags.from_fields import DATA, OUTPUT
from lora.cli.flags.shared import Json, Overwrite
from lora.runs.typed_json import json_text
from lora.terminal import build_console, print_line

if TYPE_CHECKING:
    from lora.report import Report

OUT_OF_SEVERAL = Path("report")
Out = Annotated[
    Path | None,
    Parameter(
        group=OUTPUT,
        help="Directory to write to. Default: the run directory of a single run, else report.",
    ),
]
Title = Annotated[
    str | None, Parameter(group=OUTPUT, help="Title of the page. Default: the runs' names.")
]


def report(
    runs: Annotated[list[Path] | None, Parameter(group=DATA)] = None,
    *,
    out: Out = None,
    title: Title = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Write a report of one run, or of several runs side by side.

    For example:

        lora report runs/orders
        lora report runs/orders runs/orders-full --out orders-compared
        lora report runs/ranks --title "Which rank?"

    Run directories of lora finetune, sweep and compare can be mixed; unfinished
    runs are shown as far as they got. Writes report.html (self-contained),
    report.json and pictures/; a former report there is replaced.

    Parameters
    ----------
    runs
        Run directories.
    """
    from lora.report import write_report

    runs = runs or []
    if out is None:
        out = runs[0] if len(runs) == 1 and runs[0].is_dir() else OUT_OF_SEVERAL
    files = write_report(tuple(runs), out, title, overwrite=overwrite)
    if json:
        print(json_text(files.report.to_dict(), default=str))
        return 0
    _print(files.report)
    print_line(f"report: {files.html}\npictures: {files.html.parent / 'pictures'}")
    return 0


def _print(report: Report) -> None:

    from lora.report.terminal import print_report

    print_report(report, build_console())
