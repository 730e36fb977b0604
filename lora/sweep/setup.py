"""What a sweep needs before its first wave: data, stack size, context, record."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from lora.data.prepare import PreparedData, prepare_data
from lora.data.sequences.batches import ordered_batches
from lora.data.tokenizers.subword import load_tokenizer
from lora.decoder.language_model import LanguageModel
from lora.device import DeviceChoice
from lora.distributed.world import ALONE, World
from lora.errors import CheckpointError, DataError
from lora.inference.run_settings import prompts_to_resume
from lora.pretrained.load.models import model_config
from lora.pretrained.load.task import check_lengths
from lora.runs.directory import Run, read_start_time
from lora.runs.read_record import read_run_record
from lora.runs.sweep_record import (
    SWEEP_FILE,
    CandidateState,
    SweepRecord,
    read_sweep_record,
    write_sweep_record,
)
from lora.sweep.capacity import plan_stack_memory
from lora.sweep.context import SweepContext, candidate_run
from lora.sweep.grid import Candidate
from lora.sweep.halving import find_rungs
from lora.sweep.job import SweepJob, describe_candidate, takes_fast
from lora.sweep.progress import SweepProgress
from lora.training.losses import loss_for
from lora.training.plain_step import evaluate


def prepare_sweep(
    job: SweepJob, model_folder: Path, progress: SweepProgress, world: World = ALONE
) -> PreparedData:
    """Return the examples as sequences; raises DataError if there is no validation data.

    The chat template sees the date on which the sweep started, in all processes the same.
    """
    sizes = model_config(model_folder, job.implementation)
    data = prepare_data(
        job.data,
        load_tokenizer(model_folder),
        job.data_config,
        int(job.grid.seed[0]),
        validation_source=job.eval_data,
        now=world.on_main(lambda: _start_time(job, world), "the start time"),
        trained=prompts_to_resume(job.run.out / str(job.run.name)) if job.resume else None,
        n_rows=sizes.vocab_size,
        on_message=progress.message,
    )
    check_lengths(sizes, data)
    if data.validation is None:
        raise DataError(
            "Cannot sweep without validation data: candidates are compared by validation loss. "
            "Give more examples, --eval-data, or an --eval-fraction above 0."
        )
    progress.message(
        f"{len(data.train_examples)} training examples ({data.train.n_target_tokens:,} target "
        f"tokens in {len(data.train)} sequences), {len(data.validation_examples)} validation "
        "examples"
    )
    return data


def _start_time(job: SweepJob, world: World) -> datetime | None:
    known = read_start_time(job.run.out / str(job.run.name)) if job.resume else None
    return known if world.is_alone or known is not None else datetime.now()


def choose_stack_size(
    job: SweepJob,
    model: LanguageModel,
    candidates: list[Candidate],
    data: PreparedData,
    choice: DeviceChoice,
    progress: SweepProgress,
    saved: SweepRecord | None,
    world: World = ALONE,
    quantised_weights: frozenset[str] | None = None,
) -> tuple[int, str]:
    """Return how many candidates train together in each process, and the memory plan in words.

    A resumed sweep keeps the number it began with unless the job gives one: other waves would have
    matmuls of other shapes, and other last bits.
    """
    memory = plan_stack_memory(
        model,
        candidates,
        job.train.micro_batch_size,
        data.train.sequence_length,
        packed=job.data_config.is_packed,
        learned_fraction=data.train.n_target_tokens
        / (len(data.train) * data.train.sequence_length),
        choice=choice,
        fast=takes_fast(job),
        processes_here=world.local_size,
        base=job.base_weights,
        quantised_weights=quantised_weights,
    )
    each = math.ceil(len(candidates) / world.size)  # of the largest part
    counts = [n for n in world.gather(memory.n_fit, "the memory of all") if n is not None]
    fit = max(1, min(counts, default=each))
    given = job.at_once or (saved.at_once if saved else None)
    at_once = min(given or fit, each)
    waves = math.ceil(each / at_once)
    at_once = at_once if given else math.ceil(each / waves)  # waves of equal size
    in_waves = f"{at_once} at once, {waves} {'wave' if waves == 1 else 'waves'}"
    if not world.is_alone:
        in_waves += f" on each of {world.size} devices"
    progress.message(f"memory: {memory.describe()}; {in_waves}")
    if memory.n_fit is not None and at_once > memory.n_fit:
        progress.message(
            f"note: {at_once} candidates at once may not fit into memory. --at-once "
            f"{max(1, memory.n_fit)}, more --gradient-accumulation or a shorter --max-length need "
            "less"
        )
    return at_once, memory.describe()


def build_context(
    job: SweepJob,
    candidates: list[Candidate],
    model: LanguageModel,
    data: PreparedData,
    choice: DeviceChoice,
    run: Run,
    progress: SweepProgress,
    memory_plan: str,
    world: World = ALONE,
) -> SweepContext:
    """Return what all waves share."""
    assert data.validation is not None  # prepare_sweep refuses data without
    return SweepContext(
        candidates=tuple(candidates),
        model=model,
        train=data.train,
        validation=data.validation,
        micro_batch_size=job.train.micro_batch_size,
        micro_batches=job.train.gradient_accumulation,
        eval_every_steps=job.run.eval_interval(job.train.n_steps),
        save_every_steps=job.run.save_interval(job.train.n_steps),
        choice=choice,
        run=run,
        progress=progress,
        save=job.run.save,
        memory_plan=memory_plan,
        fast=takes_fast(job),
        world=world,
    )


def read_saved_record(job: SweepJob, candidates: list[Candidate]) -> SweepRecord | None:
    """Return the record of a sweep that is resumed; None if it had not begun.

    Raises CheckpointError if it is damaged or lists other candidates.
    """
    folder = job.run.out / str(job.run.name)
    record = read_sweep_record(folder) if job.resume else None
    if record is not None and [c.name for c in record.candidates] != [c.name for c in candidates]:
        raise CheckpointError(
            f"Cannot resume {folder}: its {SWEEP_FILE} lists "
            f"{', '.join(c.name for c in record.candidates) or 'no candidates'}. Resume with the "
            "values it started with, or start a new sweep."
        )
    return record


def open_record(
    job: SweepJob, context: SweepContext, at_once: int, saved: SweepRecord | None
) -> SweepRecord:
    """Return the sweep's record: the saved one, or a new one, with the base's validation loss."""
    if saved is not None:
        return replace(saved, at_once=at_once)
    world, choice = context.world, context.choice
    size, device = context.micro_batch_size, choice.device
    batches = ordered_batches(context.validation, size, device, world.share)
    loss = evaluate(context.model, batches, loss_for(context.model), choice.autocast, world)
    stored = f" over the base in {job.base_dtype}" if job.base_weights.is_quantised else ""
    context.progress.message(f"validation loss without an adapter{stored}: {loss:.4f}")
    record = SweepRecord(
        candidates=[CandidateState(c.name, c.settings()) for c in context.candidates],
        rungs=find_rungs(job.train.n_steps, halving=job.halving),
        at_once=at_once,
        base_eval_loss=loss,
    )
    world.on_main(lambda: _write_records(context, record), "the records of the candidates")
    return record


def _write_records(context: SweepContext, record: SweepRecord) -> None:
    sweep = read_run_record(context.run.folder)
    for candidate in context.candidates:
        own = candidate_run(context.run, candidate)
        own.write_run_record(describe_candidate(sweep, candidate))
    write_sweep_record(context.run, record)
