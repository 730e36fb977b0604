"""Run folders of any kind into one report: runs, sweeps, comparisons, and a mix of them."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora.errors import CheckpointError, ConfigError, did_you_mean, gather
from lora.report.records.comparisons import find_ratios, read_comparison_directory
from lora.report.records.records import ComparisonRecord, Report, RunSummary, SweepSummary
from lora.report.records.runs import read_run
from lora.report.records.sweeps import read_sweep
from lora.runs.comparison_record import COMPARE_FILE
from lora.runs.read_record import read_run_record
from lora.runs.record import RUN_FILE
from lora.runs.sweep_record import SWEEP_FILE
from lora.runs.typed_json import Faults

ADVICE = (
    "Name folders of lora finetune, lora sweep or lora compare (those with run.json). A damaged "
    "file can be moved away: what it said is then left out."
)


def read_report(folders: Sequence[Path], out: Path, title: str | None = None) -> Report:
    """Return what the run folders tell; `out` is where the report will lie.

    Raises ConfigError if none or one twice is named, and CheckpointError with everything that is
    missing or damaged, each with the file's name.
    """
    if not folders:
        raise ConfigError("A report was asked for without run folders: name at least one.")
    twice = [str(p) for p, n in Counter(folder.resolve() for folder in folders).items() if n > 1]
    if twice:
        raise ConfigError(f"A report was asked for with a folder twice: {', '.join(twice)}.")
    faults: Faults = []
    runs: list[RunSummary] = []
    sweeps: list[SweepSummary] = []
    comparisons: list[ComparisonRecord] = []
    for folder, name in zip(folders, _names(folders), strict=True):
        if (fault := _not_a_run(folder)) is not None:
            faults.append(fault)
            continue
        kind = read_run_record(folder, []).kind  # whoever reads it again names the faults
        if kind == "sweep" or (folder / SWEEP_FILE).is_file():
            sweep, found = read_sweep(folder, out, name, faults)
            sweeps.append(sweep)
        elif kind == "compare" or (folder / COMPARE_FILE).is_file():
            comparison, found = read_comparison_directory(folder, out, name, faults)
            comparisons.append(comparison)
        else:
            found = [replace(read_run(folder, out, faults), name=name, label=name)]
        runs += found
    if faults:
        heading = "The report cannot be made from these folders:"
        raise CheckpointError(gather(faults, heading, ADVICE))
    return Report(
        title=title or _title(folders),
        runs=tuple(runs),
        sweeps=tuple(sweeps),
        comparisons=tuple(comparisons),
        ratios=find_ratios(runs, sweeps),
        notes=(*_notes(runs), *_notes_of(comparisons)),
        command=_command(folders, title),
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """Return a name for each folder: its own, with the folder above where two are called alike."""
    names = [folder.resolve().name for folder in folders]
    doubled = {name for name, n in Counter(names).items() if n > 1}
    longer = [
        f"{folder.resolve().parent.name}/{name}" if name in doubled else name
        for folder, name in zip(folders, names, strict=True)
    ]
    still = {name for name, n in Counter(longer).items() if n > 1}
    return [f"{n} ({k})" if n in still else n for k, n in enumerate(longer, start=1)]


def _not_a_run(folder: Path) -> str | None:
    if not folder.is_dir():
        above = folder.parent
        near = [path.name for path in above.iterdir()] if above.is_dir() else []
        kind = "is a file" if folder.exists() else "does not exist"
        return f"{folder} {kind}.{did_you_mean(folder.name, near)}"
    if not (folder / RUN_FILE).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{RUN_FILE}"))
        hint = f" Runs are inside: {', '.join(inside[:5])}." if inside else ""
        return f"{folder} is no run: it has no {RUN_FILE}.{hint}"
    return None


def _title(folders: Sequence[Path]) -> str:
    names = _names(folders)
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} runs"


def _command(folders: Sequence[Path], title: str | None) -> str:
    words = ["lora", "report", *(str(folder) for folder in folders)]
    return shlex.join([*words, *(["--title", title] if title else [])])


def _notes_of(comparisons: Sequence[ComparisonRecord]) -> list[str]:
    several = len(comparisons) > 1
    return [
        f"{one.name}: {note}" if several else f"{note[:1].upper()}{note[1:]}."
        for one in comparisons
        for note in one.notes
    ]


def _notes(runs: Sequence[RunSummary]) -> tuple[str, ...]:
    """Return what forbids, or may forbid, to compare the runs' losses."""
    notes = []
    if len({run.base_fingerprint for run in runs if run.base_fingerprint}) > 1:
        notes.append("The runs do not begin from the same base: their losses differ by that too.")
    prints = [run.data.get("held_out_fingerprint") for run in runs if run.held_out]
    if len({p for p in prints if p is not None}) > 1:
        notes.append(
            "The runs were not measured on the same held-out rows: their losses cannot be compared."
        )
    elif len(prints) > 1 and None in prints and any(prints):
        notes.append("Of some runs it is not known on which held-out rows they were measured.")
    if len({run.device for run in runs if run.device}) > 1:
        notes.append("The runs were not all on the same device: times and memory differ by that.")
    return tuple(notes)
