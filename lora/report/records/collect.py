"""Read run directories of any kind into one report: runs, sweeps, comparisons, or a mix."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora.errors import CheckpointError, ConfigError, did_you_mean, gather
from lora.report.records.comparisons import find_ratios, read_comparison_directory
from lora.report.records.records import ComparisonSummary, Report, RunSummary, SweepSummary
from lora.report.records.runs import read_run
from lora.report.records.sweeps import read_sweep
from lora.runs.comparison_record import COMPARE_FILE
from lora.runs.read_record import read_run_record
from lora.runs.record import RUN_FILE
from lora.runs.sweep_record import SWEEP_FILE
from lora.runs.typed_json import Faults

ADVICE = (
    "Give run directories of lora finetune, lora sweep or lora compare (they hold run.json). If a "
    "file is damaged, move it away: the report then leaves its content out."
)


def read_report(folders: Sequence[Path], out: Path, title: str | None = None) -> Report:
    """Return the report on run directories; `out` is the directory it will be written to.

    Raises ConfigError for none or for one given twice, and CheckpointError with everything that is
    missing or damaged, each with the file's name.
    """
    if not folders:
        raise ConfigError("Cannot make a report of no runs. Give at least one run directory.")
    twice = [str(p) for p, n in Counter(folder.resolve() for folder in folders).items() if n > 1]
    if twice:
        raise ConfigError(f"Cannot report on a run twice: {', '.join(twice)}. Give it once.")
    faults: Faults = []
    runs: list[RunSummary] = []
    sweeps: list[SweepSummary] = []
    comparisons: list[ComparisonSummary] = []
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
        heading = "Cannot make the report:"
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
    """Return a name for each directory: its own, preceded by its parent's where two are equal."""
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
        hint = f" It contains the runs {', '.join(inside[:5])}." if inside else ""
        return f"{folder} is not a run directory: it has no {RUN_FILE}.{hint}"
    return None


def _title(folders: Sequence[Path]) -> str:
    names = _names(folders)
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} runs"


def _command(folders: Sequence[Path], title: str | None) -> str:
    words = ["lora", "report", *(str(folder) for folder in folders)]
    return shlex.join([*words, *(["--title", title] if title else [])])


def _notes_of(comparisons: Sequence[ComparisonSummary]) -> list[str]:
    several = len(comparisons) > 1
    return [
        f"{one.name}: {note}" if several else f"{note[:1].upper()}{note[1:]}."
        for one in comparisons
        for note in one.notes
    ]


def _notes(runs: Sequence[RunSummary]) -> tuple[str, ...]:
    """Return what makes the runs' losses, times or memory not comparable."""
    notes = []
    if len({run.base_fingerprint for run in runs if run.base_fingerprint}) > 1:
        notes.append("The runs started from different bases: their losses differ by that too.")
    bases = {run.stored_base for run in runs if run.method != "full"}
    if len(bases) > 1:
        notes.append(
            f"LoRA trained over other values of the base ({'; '.join(sorted(bases))}): the losses "
            "differ by that too."
        )
    prints = [run.data.get("held_out_fingerprint") for run in runs if run.held_out]
    if len({p for p in prints if p is not None}) > 1:
        notes.append(
            "The runs were evaluated on different validation data: their losses cannot be compared."
        )
    elif len(prints) > 1 and None in prints and any(prints):
        notes.append("It is not known for all runs on which validation data they were evaluated.")
    if len({run.device for run in runs if run.device}) > 1:
        notes.append("The runs used different devices: times and memory differ by that.")
    return tuple(notes)
