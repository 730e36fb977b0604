"""Terminal view of a data report; target tokens are marked, so it works without colours too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora.terminal import shortened, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lora.data.inspection_report import DataReport, Preview

_BAR_CELLS = 40
_SHORT_CHARACTERS = 240


def print_report(report: DataReport, console: Console, *, is_compact: bool = False) -> None:
    """Print a report: formats, lengths, target tokens, and the first examples.

    The compact view has no histogram and leaves out the middle of long examples. Target text is
    coloured and between marks. Control characters in the data are shown as escapes, so that data
    cannot control the terminal.
    """
    from rich.text import Text

    is_ascii = console.options.ascii_only
    console.print(Text(f"Data: {visible(report.source, is_ascii)}", style="bold"))
    if report.n_examples:
        console.print(_summary(report, is_compact, is_ascii))
    if report.histogram and not is_compact:
        console.print(Text("\nTokens per example, before any cut", style="bold"))
        console.print(_bars(report, is_ascii))
    for preview in report.previews:
        console.print(_preview(preview, is_ascii, _SHORT_CHARACTERS if is_compact else None))
    for note in report.notes:
        console.print(Text(f"note: {visible(note, is_ascii)}"))
    for warning in report.warnings:
        console.print(Text(f"warning: {visible(warning, is_ascii)}", style="yellow"))
    for error in report.errors:
        console.print(Text(f"error: {visible(error, is_ascii)}", style="red"))


def _summary(report: DataReport, is_compact: bool, is_ascii: bool) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    all_tokens = max(1, report.n_learned_tokens + report.n_ignored_tokens)
    formats = ", ".join(f"{count:,} {name}" for name, count in report.formats.items())
    rows = [
        ("examples", f"{report.n_examples:,} ({formats})"),
        ("columns", shortened(", ".join(report.columns))),
        # The compact view comes after a message that names the template.
        ("chat template", "" if is_compact else report.template_origin or ""),
        ("target tokens", f"{report.n_learned_tokens:,} (learn_on: {report.learn_on})"),
        ("context tokens", f"{report.n_ignored_tokens:,}"),
        ("target fraction", f"{report.n_learned_tokens / all_tokens:.1%}"),
        ("sequences", f"{report.n_rows:,}, {report.fill_fraction:.1%} filled"),
        ("special tokens", ", ".join(f"{t} {n:,} times" for t, n in report.special_tokens.items())),
        ("truncated", f"{report.counts.n_truncated:,}" if report.counts.n_truncated else ""),
        ("split", f"{report.counts.n_split:,}" if report.counts.n_split else ""),
        ("dropped", f"{report.counts.n_dropped:,}" if report.counts.n_dropped else ""),
        ("example tokens", _quantiles(report) if is_compact else ""),
    ]
    for name, value in rows:
        if value:
            table.add_row(name, Text(visible(value, is_ascii)))
    return table


def _bars(report: DataReport, is_ascii: bool) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    highest = max(count for _, _, count in report.histogram)
    for fewest, most, count in report.histogram:
        n_cells = -(-count * _BAR_CELLS // highest)
        fate = "longer than max_length" if fewest > report.max_length else ""
        bar = ("#" if is_ascii else "█") * n_cells
        table.add_row(f"{fewest:,}-{most:,}", bar, f"{count:,}", fate)
    table.add_row("", _quantiles(report))
    return table


def _quantiles(report: DataReport) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in report.quantiles_tokens.items())


def _preview(preview: Preview, is_ascii: bool, max_characters: int | None) -> Text:
    from rich.text import Text

    begin, end = ("[[", "]]") if is_ascii else ("⟦", "⟧")
    text = Text()
    text.append(f"\n{visible(preview.source, is_ascii)}", style="bold")
    text.append(f"  (target tokens are between {begin} and {end})\n", style="dim")
    for content, is_target in preview.spans:
        shown = visible(_shorten(content, max_characters), is_ascii)
        if is_target:
            text.append(f"{begin}{shown}{end}", style="bold green")
        else:
            text.append(shown, style="dim")
    if preview.n_more_tokens:
        text.append(f" ... and {preview.n_more_tokens:,} more tokens", style="dim")
    return text


def _shorten(text: str, max_characters: int | None) -> str:
    """Return the text, without its middle if it is long."""
    if max_characters is None or len(text) <= max_characters:
        return text
    half = max_characters // 2
    return f"{text[:half]} [...] {text[-half:]}"
