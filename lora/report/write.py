"""Write the files of a report: page, JSON and pictures, each whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora.errors import CheckpointError, ConfigError
from lora.report.course import course_pictures
from lora.report.curves import draw_loss_curves
from lora.report.figures import (
    Picture,
    comparison_pictures,
    loss_pictures,
    memory_picture,
    sweep_pictures,
)
from lora.report.page import Drawing, build_page
from lora.report.records.collect import read_report
from lora.report.records.records import REPORT_KIND, Report
from lora.report.svg import png_of, svg_of
from lora.runs.disk import atomic_write, disk_error
from lora.runs.interrupts import exit_on_signals
from lora.runs.outputs import OutputPath, output_lock
from lora.runs.read_record import read_metrics

HTML_FILE, JSON_FILE, PICTURES = "report.html", "report.json", "pictures"
LOSS_PICTURE, MAX_CURVES = "loss.png", 6


@dataclass(frozen=True)
class ReportFiles:
    """The files written, and the report they hold."""

    html: Path
    json: Path
    pictures: tuple[Path, ...]
    report: Report


def write_report(
    folders: Sequence[Path], out: Path, title: str | None = None, *, overwrite: bool = False
) -> ReportFiles:
    """Write `report.html`, `report.json` and `pictures/` into `out`, made if need be.

    A former report is replaced; other files of these names only with `overwrite`. `folders` are run
    directories of finetune runs, sweeps, comparisons, or a mix; unfinished ones are reported as
    they are. The same directories give the same bytes. Raises CheckpointError, before anything is
    written, with all that is missing or damaged in them, and ConfigError if something is in the
    way.
    """
    return _write(read_report(folders, out, title), out, overwrite=overwrite)


def report_on(
    directory: Path, on_message: Callable[[str], None], *, with_page: bool = True
) -> Path | None:
    """Write a finished job's loss.png and, `with_page`, its report into its own run directory.

    Returns the page, or None. A full or read-only disk is a message, not an error: what the job
    saved stays as good as it is. A single run has no loss.png: its losses are in the report.
    """
    try:
        report = read_report([directory], directory)
        draw_losses(report, directory)
        return _write(report, directory).html if with_page else None
    except (CheckpointError, ConfigError) as error:
        on_message(f"note: no report: {error} Run lora report {directory} later.")
        return None


def draw_losses(report: Report, directory: Path) -> None:
    """Write loss.png: the losses of the report's sweep or comparison; none for a single run."""
    if report.sweeps:
        candidates = [run for run in report.runs if run.method != "full"]
        full = [run for run in report.runs if run.method == "full"]
        shown = candidates[: MAX_CURVES - len(full)]
        beside = ", and full fine-tuning" if full else ""
        title = f"the best {len(shown)} of {len(candidates)} candidates{beside}"
        named = [(Path(run.folder).name, run) for run in (*shown, *full)]
    elif report.comparisons:
        title = f"{report.comparisons[0].base}: the same data and order"
        named = [(run.label, run) for run in report.runs]
    else:
        return
    curves = [(name, read_metrics(directory / run.folder)) for name, run in named]
    draw_loss_curves(curves, directory / LOSS_PICTURE, title=title)


def _write(report: Report, out: Path, *, overwrite: bool = False) -> ReportFiles:
    by_section = _pictures(report)
    # Waits for a process that writes a report here: both are complete then, and the last one stays.
    with exit_on_signals(f"the report in {out}"), output_lock(out / HTML_FILE, wait=True):
        _check_files(out, by_section, overwrite=overwrite)
        return _write_files(report, by_section, out)


def _write_files(report: Report, by_section: dict[str, list[Picture]], out: Path) -> ReportFiles:
    try:
        (out / PICTURES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(out, error) from error
    drawn: dict[str, list[Drawing]] = {}
    written = []
    for section, pictures in by_section.items():
        for picture in pictures:
            figure = picture.draw()
            svg = svg_of(figure, picture.name, picture.alt)
            drawn.setdefault(section, []).append(Drawing(picture.name, picture.caption, svg))
            path = out / PICTURES / f"{picture.name}.png"
            atomic_write(path, png_of(figure))
            written.append(path)
    page = build_page(report, drawn)
    html, data = out / HTML_FILE, out / JSON_FILE
    text = json.dumps(report.to_dict(), indent=2, sort_keys=True, default=str, allow_nan=False)
    atomic_write(data, f"{text}\n".encode())
    atomic_write(html, page.encode("utf-8", errors="replace"))  # JSON may hold half a surrogate
    return ReportFiles(html, data, tuple(written), report)


def _check_files(out: Path, by_section: dict[str, list[Picture]], *, overwrite: bool) -> None:
    """Raise ConfigError for what a report may not replace, before anything is written."""
    folder = out / PICTURES
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(
            f"Cannot write {folder}: it is not a directory, or a symbolic link to one. Remove it, "
            "or choose another output directory."
        )
    can_replace = overwrite or _is_report(out / JSON_FILE)
    pictures = [picture for several in by_section.values() for picture in several]
    names = [HTML_FILE, JSON_FILE, *(f"{PICTURES}/{picture.name}.png" for picture in pictures)]
    for name in names:
        OutputPath(out / name, overwrite=can_replace).check_target()


def _is_report(path: Path) -> bool:
    """Whether `path` is the report.json of a former report, so that its files are ours."""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(written, dict) and written.get("kind") == REPORT_KIND


def _pictures(report: Report) -> dict[str, list[Picture]]:
    """Return the pictures of each section of the page."""
    found = {"loss": loss_pictures(report)}
    memory = memory_picture(report)
    found["course"] = course_pictures(report)
    found["memory"] = [] if memory is None else [memory]
    for number, sweep in enumerate(report.sweeps, start=1):
        found[f"group {sweep.name}"] = sweep_pictures(sweep, number)
    for number, comparison in enumerate(report.comparisons, start=1):
        found[f"group {comparison.name}"] = comparison_pictures(report, comparison, number)
    return found
