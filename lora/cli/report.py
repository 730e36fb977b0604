"""`lora report`: a page, pictures and a table from run folders."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora.report import Report

OUT_OF_SEVERAL = Path("report")


def report(
    *runs: Path, out: Path | None = None, title: str | None = None, json: bool = False
) -> int:
    """Make the report of runs again, or compare any runs.

    Examples:

        lora report runs/orders
        lora report runs/orders runs/orders-full --out orders-compared
        lora report runs/ranks --title "Which rank?"

    Runs are folders of lora finetune, lora sweep or lora compare, in any mix; one that is still
    going on, or was interrupted, is told as it stands. Written are report.html (one file that needs
    nothing else), report.json and pictures/.

    Parameters
    ----------
    runs
        Folders of runs.
    out
        Where to write; left out, a single run's own folder, or the folder report for several.
    title
        Heading of the page; left out, the runs' names.
    json
        Print what report.json holds, and nothing else.
    """
    from lora.report import write_report

    if out is None:
        out = runs[0] if len(runs) == 1 and runs[0].is_dir() else OUT_OF_SEVERAL
    files = write_report(runs, out, title)
    if json:
        print(json_format.dumps(files.report.to_dict(), default=str))
        return 0
    _print(files.report)
    print(f"report: {files.html}\npictures: {files.html.parent / 'pictures'}")
    return 0


def _print(report: Report) -> None:
    from rich.console import Console

    from lora.report.terminal import print_report

    print_report(report, Console(highlight=False))
