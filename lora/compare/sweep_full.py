"""Full fine-tuning beside a sweep's candidates: the same base, data, order and steps.

    runs/NAME/full/       an ordinary run's folder, with model/
    runs/NAME/full.json   how it stands to the candidates

It trains after them, in a process of its own: its peak of memory is its own.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora.config import FULL_LEARNING_RATE, TrainConfig
from lora.data.inspection_report import DataReport
from lora.errors import CheckpointError
from lora.finetune.job import FinetuneJob
from lora.finetune.run import finetune
from lora.runs.directory import Run
from lora.runs.disk import read_json, read_rows
from lora.runs.progress import NoProgress, Progress
from lora.runs.read_record import measured_peak
from lora.runs.subprocesses import run_in_subprocess
from lora.runs.sweep_record import CandidateState
from lora.sweep.grid import SWEPT
from lora.sweep.job import SweepJob
from lora.sweep.progress import SweepProgress
from lora.sweep.run import SweepResult, sweep

FULL, FULL_FILE = "full", "full.json"
NOTHING = "–"
"""Where full fine-tuning has no such setting."""


@dataclass(frozen=True)
class FullResult:
    """How full fine-tuning ended."""

    folder: Path
    standing: CandidateState
    """As a candidate's, so that it stands in the same table."""
    train_s: float
    peak_memory_bytes: int
    stored_bytes: int


def sweep_with_full(
    job: SweepJob,
    progress: SweepProgress,
    full_rate: float | None = None,
    *,
    show_data: Callable[[DataReport], None] | None = None,
    full_progress: Progress | None = None,
) -> tuple[SweepResult, FullResult]:
    """Run the sweep, then full fine-tuning at `full_rate` (None: its default).

    A sweep that was run without it can be resumed with it. Raises what `sweep` and `finetune`
    raise, and CheckpointError if the two did not get the same data.
    """
    done = sweep(job, progress, show_data=show_data)
    gc.collect()  # the sweep's base
    run = Run(done.folder)
    path = done.folder / FULL_FILE
    if not path.is_file():
        progress.message("full fine-tuning on the same data, in the same order")
        member = _full_job(job, done.folder, full_rate)
        found = run_in_subprocess(_train, member, progress=full_progress or NoProgress())
        _check_same_data(done.folder)
        run.write_json(FULL_FILE, found)
    shutil.rmtree(done.folder / FULL / "checkpoints", ignore_errors=True)
    return done, _read(done.folder)


def _full_job(job: SweepJob, folder: Path, rate: float | None) -> FinetuneJob:
    """Return the run that has all that the candidates share, of seed and schedule the first."""
    resume = (folder / FULL / "run.json").is_file()
    if not resume:
        shutil.rmtree(folder / FULL, ignore_errors=True)
    train: TrainConfig = replace(
        job.train,
        seed=int(job.grid.seed[0]),
        schedule=job.grid.schedule[0],  # type: ignore[arg-type]
        learning_rate=rate or FULL_LEARNING_RATE,
    )
    run = replace(job.run, out=folder, name=FULL, keep_checkpoints=1, samples=0, patience=0)
    return FinetuneJob(
        data=job.data,
        model=job.model,
        eval_data=job.eval_data,
        lora=None,
        train=train,
        data_config=job.data_config,
        run=run,
        resume=resume,
    )


def _train(job: FinetuneJob, progress: Progress) -> dict[str, Any]:
    """Train in this process, and return what `full.json` holds."""
    done = finetune(job, progress)
    rows = read_rows(done.folder / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    held_out = [(row["eval_loss"], row["step"]) for row in rows if "eval_loss" in row]
    best_loss, best_step = min(held_out)
    standing = CandidateState(
        name=FULL,
        settings={
            **dict.fromkeys(SWEPT, NOTHING),
            "rank": FULL,
            "learning_rate": job.train.learning_rate,
            "seed": job.train.seed,
            "schedule": job.train.schedule,
        },
        status="done",
        step=done.result.steps,
        loss=losses[-1] if losses else None,
        eval_loss=done.result.eval_loss,
        best_eval_loss=best_loss,
        best_step=best_step,
        row=done.result.steps * job.train.batch_size,
    )
    return {
        "standing": asdict(standing),
        "train_s": done.result.train_s,
        "peak_memory_bytes": measured_peak(done.folder, done.result.peak_memory_bytes),
        "stored_bytes": sum(f.stat().st_size for f in done.saved.glob("*.safetensors")),
    }


def _check_same_data(folder: Path) -> None:
    own, swept = (
        read_json(path / "run.json")["data"]["fingerprint"] for path in (folder / FULL, folder)
    )
    if own != swept:
        raise CheckpointError(
            f"Full fine-tuning in {folder / FULL} did not get the rows of the sweep: the data or "
            "the date that the chat template tells has changed since. Begin a new sweep."
        )


def _read(folder: Path) -> FullResult:
    found = read_json(folder / FULL_FILE)
    return FullResult(folder / FULL, **{**found, "standing": CandidateState(**found["standing"])})
