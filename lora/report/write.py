"""From run folders to the files of a report, each written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora.errors import CheckpointError
from lora.report.figures import (
    Picture,
    comparison_pictures,
    loss_pictures,
    memory_picture,
    sweep_pictures,
)
from lora.report.page import Drawn, build_page
from lora.report.records.collect import read_report
from lora.report.records.records import Report
from lora.report.svg import png_of, svg_of
from lora.runs.folder import atomic_write, disk_error

HTML_FILE, JSON_FILE, PICTURES = "report.html", "report.json", "pictures"


@dataclass(frozen=True)
class ReportFiles:
    """What was written, and what it says."""

    html: Path
    json: Path
    pictures: tuple[Path, ...]
    report: Report


def write_report(folders: Sequence[Path], out: Path, title: str | None = None) -> ReportFiles:
    """Write `report.html`, `report.json` and `pictures/` into `out`, made if need be.

    `folders` are of finetune runs, sweeps, comparisons, or a mix; what is under way is told as it
    stands. The same folders give the same bytes. Raises CheckpointError, before anything is
    written, with all that is missing or damaged in them.
    """
    report = read_report(folders, out, title)
    by_section = _pictures(report)
    try:
        (out / PICTURES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(out, error) from error
    drawn: dict[str, list[Drawn]] = {}
    written = []
    for section, pictures in by_section.items():
        for picture in pictures:
            figure = picture.draw()
            svg = svg_of(figure, picture.name, picture.alt)
            drawn.setdefault(section, []).append(Drawn(picture.name, picture.caption, svg))
            path = out / PICTURES / f"{picture.name}.png"
            atomic_write(path, png_of(figure))
            written.append(path)
    page = build_page(report, drawn)
    html, data = out / HTML_FILE, out / JSON_FILE
    text = json.dumps(report.to_dict(), indent=2, sort_keys=True, default=str, allow_nan=False)
    atomic_write(data, f"{text}\n".encode())
    atomic_write(html, page.encode("utf-8", errors="replace"))  # JSON may hold half a surrogate
    return ReportFiles(html, data, tuple(written), report)


def report_on(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Write the report of a run into its own folder, at its end; return the page.

    A disk that refuses is told to `say`: what the run has saved stays as good as it is.
    """
    try:
        return write_report([folder], folder).html
    except CheckpointError as error:
        say(f"note: no report: {error} lora report {folder} makes it later.")
        return None


def _pictures(report: Report) -> dict[str, list[Picture]]:
    """Return the pictures of each section of the page."""
    found = {"loss": loss_pictures(report)}
    memory = memory_picture(report)
    found["memory"] = [] if memory is None else [memory]
    for number, sweep in enumerate(report.sweeps, start=1):
        found[f"group {sweep.name}"] = sweep_pictures(sweep, number)
    for number, comparison in enumerate(report.comparisons, start=1):
        found[f"group {comparison.name}"] = comparison_pictures(report, comparison, number)
    return found
