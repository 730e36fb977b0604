"""Prints a report on the terminal: its findings and tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora.report.page import find_findings
from lora.report.records.records import Report
from lora.report.tables import Table, dropped_table, ratios_table, runs_table

if TYPE_CHECKING:
    from rich.console import Console

MAX_ROWS = 20
NARROW_COLUMNS = ("method", "rank", "learning rate", "steps", "validation", "step", "peak")
"""Columns shown where the terminal is too narrow for all."""
WIDE = 140


def print_report(report: Report, console: Console) -> None:
    """Print findings, runs, LoRA compared with the others, and stopped or failed candidates."""
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
    for finding in find_findings(report):
        console.print(_plain(finding), markup=False)
    _print_table(runs_table(report), console)
    if report.ratios:
        _print_table(ratios_table(report), console)
    dropped = dropped_table(report.runs)
    if dropped is not None:
        _print_table(dropped, console)


def _print_table(table: Table, console: Console) -> None:
    from rich.table import Table as RichTable
    from rich.text import Text

    is_narrow = console.width < WIDE and table.corner == "run"
    kept = [n for n, c in enumerate(table.columns) if not is_narrow or c.title in NARROW_COLUMNS]
    shown = RichTable(box=None, pad_edge=False, header_style="dim")
    shown.add_column(table.corner)
    for n in kept:
        column = table.columns[n]
        heading = f"{column.title}\n{column.unit}" if column.unit else column.title
        shown.add_column(heading, justify="right" if column.is_numeric else "left")
    for row in table.rows[:MAX_ROWS]:
        name = f"{row.group}: {row.name}" if row.group else row.name
        shown.add_row(Text(_plain(name)), *(Text(_plain(row.cells[n])) for n in kept))
    console.print()
    console.print(shown)
    if len(table.rows) > MAX_ROWS:
        console.print(f"… and {len(table.rows) - MAX_ROWS} more: see the page")


def _plain(text: str) -> str:
    """Return `text` without control characters."""
    return "".join(c if c.isprintable() else "�" for c in text)
