"""Full fine-tuning beside a sweep's candidates: the same base, data, order and steps.

    runs/NAME/full/       its run directory, with model/
    runs/NAME/full.json   its result, with the fields of a candidate

It trains after the candidates in a subprocess, so that its peak memory is its own.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lora.compare.together import group_of_subprocesses, is_begun
from lora.config import FULL_LEARNING_RATE, TrainConfig
from lora.data.inspection_report import DataReport
from lora.distributed.devices import check_batch
from lora.distributed.ranks import world_size
from lora.distributed.start import joined
from lora.distributed.world import World
from lora.errors import CheckpointError
from lora.finetune.job import FinetuneJob
from lora.finetune.run import finetune
from lora.pretrained.load.task import settled_base
from lora.pretrained.sources import find_model
from lora.runs.directory import Run
from lora.runs.progress import NoProgress, Progress
from lora.runs.read_record import (
    file_version,
    measured_peak,
    read_metrics,
    read_record_file,
    read_run_record,
    stored_bytes,
)
from lora.runs.subprocesses import run_in_subprocess
from lora.runs.sweep_record import CandidateState
from lora.runs.typed_json import Faults, to_json
from lora.sweep.grid import SWEPT
from lora.sweep.job import SweepJob
from lora.sweep.progress import SweepProgress
from lora.sweep.run import SweepResult, sweep

FULL, FULL_FILE = "full", "full.json"
SCHEMA_VERSION = 1
"""Of full.json. Version 0 had no number, and called the candidate `standing`."""
NOT_APPLICABLE = "–"
"""In place of a setting that full fine-tuning does not have."""


@dataclass(frozen=True)
class FullRecord:
    """What full.json holds."""

    candidate: CandidateState
    """Full fine-tuning as a candidate: it belongs into the same table."""
    train_s: float
    """In steps; evaluations and saves left out."""
    peak_memory_bytes: int
    stored_bytes: int
    """Of the saved model's tensors."""
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class FullResult:
    """The run directory of full fine-tuning, and its result."""

    folder: Path
    record: FullRecord


def sweep_with_full(
    job: SweepJob,
    progress: SweepProgress,
    full_rate: float | None = None,
    *,
    show_data: Callable[[DataReport], None] | None = None,
    full_progress: Progress | None = None,
) -> tuple[SweepResult, FullResult]:
    """Run the sweep, then full fine-tuning at learning rate `full_rate` (None: its default).

    A sweep that was run without it can be resumed with it. Raises what `sweep` and `finetune`
    raise, and CheckpointError if the two did not get the same data. Several processes share the
    candidates, then train in full together.
    """
    # Of full fine-tuning, before all candidates are trained.
    check_batch(job.train, World(size=world_size()))
    settled_base(find_model(job.model).folder, job.base_weights, is_full=True)
    done = sweep(job, progress, show_data=show_data)
    gc.collect()  # frees the sweep's base before the subprocess loads its own
    with joined(torch.device("cpu")) as world:
        shown = full_progress if world.is_main and full_progress else NoProgress()
        if not world.on_main((done.folder / FULL_FILE).is_file, "an earlier result"):
            if world.is_main:
                progress.message("full fine-tuning on the same data, in the same order")
            resume = world.on_main(lambda: is_begun(done.folder / FULL), "an earlier run")
            full_job = _full_job(job, done.folder, full_rate, resume=resume)
            group = group_of_subprocesses(world)
            record = run_in_subprocess(_train, full_job, progress=shown, environment=group)
            world.gather(None, "full fine-tuning in all processes")
            world.on_main(lambda: _write(done.folder, record), "the result")
        return done, FullResult(
            done.folder / FULL, world.on_main(lambda: _stored(done.folder), "the result")
        )


def _write(folder: Path, record: FullRecord) -> None:
    _check_same_data(folder)
    Run(folder).write_json(FULL_FILE, to_json(record))


def _stored(folder: Path) -> FullRecord:
    shutil.rmtree(folder / FULL / "checkpoints", ignore_errors=True)
    stored = read_record_file(FullRecord, folder / FULL_FILE, upgrade=_upgraded)
    assert stored is not None  # just written, or seen before
    return stored


def _full_job(
    job: SweepJob, folder: Path, rate: float | None, *, resume: bool = False
) -> FinetuneJob:
    """Return a job with the settings that all candidates share, and the first seed and schedule.

    Its steps are those of the sweep in `folder`: a resumed one may have taken them from its record.
    """
    recorded = read_run_record(folder).sweep
    assert recorded is not None  # `sweep` has written it
    train: TrainConfig = replace(
        job.train,
        steps=recorded.steps,
        epochs=None,
        seed=int(job.grid.seed[0]),
        schedule=job.grid.schedule[0],  # type: ignore[arg-type]
        learning_rate=rate or FULL_LEARNING_RATE,
    )
    run = replace(job.run, out=folder, name=FULL, keep_checkpoints=1, samples=0, patience=0)
    return FinetuneJob(
        data=job.data,
        model=job.model,
        implementation=job.implementation,
        eval_data=job.eval_data,
        lora=None,
        train=train,
        data_config=job.data_config,
        run=run,
        resume=resume,
        deterministic=job.deterministic,
    )


def _train(job: FinetuneJob, progress: Progress) -> FullRecord:
    """Train in this process, and return the record of it."""
    done = finetune(job, progress)
    rows = read_metrics(done.folder)
    losses = [row.loss for row in rows if row.loss is not None]
    evaluated = [(row.eval_loss, row.step) for row in rows if row.eval_loss is not None]
    best_loss, best_step = min(evaluated)
    candidate = CandidateState(
        name=FULL,
        settings={
            **dict.fromkeys(SWEPT, NOT_APPLICABLE),
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
        saved_step=done.result.saved_step,
        saved_eval_loss=done.result.saved_eval_loss,
        row=done.result.steps * job.train.batch_size,
    )
    return FullRecord(
        candidate=candidate,
        train_s=done.result.train_s,
        peak_memory_bytes=measured_peak(done.folder, done.result.peak_memory_bytes),
        stored_bytes=stored_bytes(done.saved),
    )


def _check_same_data(folder: Path) -> None:
    """Raise CheckpointError unless full fine-tuning trained on the sweep's data."""
    own, swept = (read_run_record(path).data.fingerprint for path in (folder / FULL, folder))
    if own != swept:
        raise CheckpointError(
            f"Cannot compare {folder / FULL} with the sweep: it trained on other data. The data "
            "changed since the sweep, or the date in the chat template did. Start a new sweep."
        )


def _upgraded(values: dict[str, Any], where: str, faults: Faults) -> dict[str, Any]:
    """Return the values of a full.json as this version has them."""
    version = file_version(values, 0, SCHEMA_VERSION, where, faults)
    return values if version else {**values, "candidate": values.get("standing")}
