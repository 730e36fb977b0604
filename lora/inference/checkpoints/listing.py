"""The checkpoints of a run directory, with their validation losses, and which is the best."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from lora.errors import CheckpointError
from lora.runs.read_record import read_metrics, read_result, read_run_record
from lora.runs.record import RUN_FILE
from lora.training.checkpoint import checkpoint_step, list_checkpoints

CHECKPOINTS, START = "checkpoints", "start"
"""Names in a run directory: of its checkpoints, and among them of the adapter before training."""
KEEPS_NONE = {
    "sweep": "a sweep keeps none of its candidates",
    "compare": "a comparison keeps none of its members",
}
"""By kind of run: why it has no checkpoints to open."""
MAX_SHOWN = 8
"""Adapters in an error message."""


@dataclass(frozen=True)
class CheckpointEntry:
    """One checkpoint of a run."""

    step: int
    eval_loss: float | None
    """Validation loss after that step, nats; None if it was not evaluated, or is not finite."""
    is_best: bool
    """Whether its validation loss is the lowest of those on the disk."""
    is_last: bool
    is_saved: bool
    """Whether `adapter/` or `model/` has its weights."""
    size_bytes: int
    path: Path


def list_entries(run: Path) -> list[CheckpointEntry]:
    """Return the complete checkpoints of the run directory `run`, oldest first.

    Raises CheckpointError if it is no run directory, or its files are damaged.
    """
    if not (run / RUN_FILE).is_file():
        raise CheckpointError(
            f"Cannot list the checkpoints of {run}: it has no {RUN_FILE}, so it is no run "
            "directory. Name one that lora finetune wrote, such as runs/orders."
        )
    check_keeps_checkpoints(run)
    losses = {
        row.step: row.eval_loss
        for row in read_metrics(run)
        if row.eval_loss is not None and math.isfinite(row.eval_loss)
    }
    paths = {checkpoint_step(path): path for path in list_checkpoints(run / CHECKPOINTS)}
    evaluated = [step for step in paths if step in losses]
    best = min(evaluated, key=lambda step: losses[step], default=None)
    result = read_result(run)
    return [
        CheckpointEntry(
            step=step,
            eval_loss=losses.get(step),
            is_best=step == best,
            is_last=step == max(paths),
            is_saved=result is not None and result.saved_step == step,
            size_bytes=sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
            path=path,
        )
        for step, path in paths.items()
    ]


def check_keeps_checkpoints(run: Path) -> None:
    """Raise CheckpointError for a damaged run.json, and for a run of a kind that keeps none."""
    kind = read_run_record(run).kind
    if kind in KEEPS_NONE:
        raise CheckpointError(
            f"Cannot open checkpoints of {run}: {KEEPS_NONE[kind]}. Adapters there: "
            f"{', '.join(map(str, _adapters_in(run))) or 'none yet'}."
        )


def _adapters_in(run: Path) -> list[Path]:
    patterns = ("best", "candidates/*/adapter", "members/*/adapter")
    found = [path for pattern in patterns for path in sorted(run.glob(pattern)) if path.is_dir()]
    return found[:MAX_SHOWN]


def find_entry(run: Path, word: str) -> CheckpointEntry:
    """Return the checkpoint that `word` names: a step, "best" or "last".

    Raises CheckpointError, with the checkpoints that are there, if there is no such one.
    """
    entries = list_entries(run)
    found = [
        entry
        for entry in entries
        if (word == "best" and entry.is_best)
        or (word == "last" and entry.is_last)
        or (word.isdecimal() and entry.step == int(word))
    ]
    if found:
        return found[0]
    if word not in ("best", "last") and not word.isdecimal():
        why = f"{word!r} is no step"
    elif word == "best" and entries:
        why = "no checkpoint there has a validation loss"
    else:
        why = "there is no checkpoint" + (f" of step {word}" if word.isdecimal() else "")
    raise CheckpointError(
        f"Cannot open {run}@{word}: {why}. Allowed: {describe_entries(run, entries)}."
    )


def describe_entries(run: Path, entries: list[CheckpointEntry]) -> str:
    """Return which checkpoints can be named, in one line."""
    if not entries:
        saved = [name for name in ("adapter", "model") if (run / name).is_dir()]
        return f"what the run saved, {run / saved[0]}" if saved else "none, the run has none yet"
    steps = ", ".join(f"{e.step} (best)" if e.is_best else str(e.step) for e in entries)
    has_best = any(entry.is_best for entry in entries)
    return f"the steps {steps}, {'best, ' if has_best else ''}last"
