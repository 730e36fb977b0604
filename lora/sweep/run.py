"""Runs a sweep: trains many adapters at once on one frozen base, and chooses the best.

    runs/NAME/
      run.json        configuration, data, environment
      sweep.json      the state of each candidate
      timings.jsonl   seconds and memory of each wave
      candidates/     by name: run.json, metrics.jsonl, adapter/
      best/           the adapter with the lowest validation loss
      result.json     which candidate that is

Each candidate ends where `lora finetune` would end with the same settings, data and seed, within
floating-point noise.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lora.adapters.fingerprint import base_fingerprint
from lora.adapters.save_load import save_adapter
from lora.config import ImplementationName
from lora.data.inspection import inspect_prepared
from lora.data.inspection_report import DataReport
from lora.data.prepare import PreparedData
from lora.data.prompting.prompt_format import save_prompt_format
from lora.device import (
    DeviceChoice,
    choose_device,
    deterministic_algorithms,
    peak_memory_bytes,
)
from lora.distributed.devices import own_device
from lora.distributed.one_run import check_alike, check_is_shared, resumes, shared_run
from lora.distributed.start import joined
from lora.distributed.world import World
from lora.errors import CheckpointError, TrainingError, gather
from lora.inference.run_settings import implementation_to_resume
from lora.lora_module import n_values
from lora.pretrained.load.models import load_language_model, model_config
from lora.pretrained.load.task import (
    check_base,
    check_native_only,
    planned_base,
    settled_base,
    settled_task,
)
from lora.pretrained.positions import describe_excess
from lora.pretrained.sources import ModelSource, find_model
from lora.runs.directory import check_run_directory, create_run, default_name
from lora.runs.disk import disk_error
from lora.runs.interrupts import StopRequests
from lora.runs.sweep_record import (
    CandidateState,
    SweepOutcome,
    SweepRecord,
    find_best,
    rank,
    write_outcome,
)
from lora.stacked.apply import single_adapter
from lora.sweep.context import SweepContext, candidate_run
from lora.sweep.grid import Candidate, build_candidates
from lora.sweep.job import (
    SweepJob,
    alike,
    check_job,
    check_same_base,
    check_same_sweep,
    describe_job,
    with_recorded_steps,
)
from lora.sweep.progress import KeptMessages, NoSweepProgress, SweepProgress
from lora.sweep.rounds import train_rounds
from lora.sweep.setup import (
    build_context,
    choose_stack_size,
    open_record,
    prepare_sweep,
    read_saved_record,
)
from lora.sweep.wave_checkpoint import TensorState, remove_candidate_state, values_to_save
from lora.training.out_of_memory import LOADING_ADVICE, explain_out_of_memory

BEST = "best"
"""Directory of the best adapter."""


@dataclass(frozen=True)
class SweepResult:
    """Where the results are, and the final state of each candidate, the best first."""

    folder: Path
    best: Path
    """Directory of the best candidate's adapter."""
    candidates: list[CandidateState]
    train_s: float
    """Seconds in steps of this process; of several, of the slowest in each round."""
    peak_memory_bytes: int
    """Of the process that took the most."""


def sweep(
    job: SweepJob,
    progress: SweepProgress | None = None,
    *,
    show_data: Callable[[DataReport], None] | None = None,
) -> SweepResult:
    """Train all candidates of `job`, save their adapters, and choose the best.

    Raises ConfigError, DataError or ModelError for a job that cannot run, before anything is
    written; TrainingError if every candidate failed; Interrupted after a signal, the state saved.

    Processes that torchrun has started share the candidates, each on its own GPU; rank 0 has the
    progress, and writes all but the candidates' directories.
    """
    check_job(job, build_candidates(job.grid, job.lora, job.train))
    with deterministic_algorithms() if job.deterministic else nullcontext():
        choice = choose_device(own_device(job.run.device), job.train.precision)
        with joined(choice.device) as world:
            if world.is_main:
                return _sweep(job, choice, world, progress or NoSweepProgress(), show_data)
            return _sweep(job, choice, world, KeptMessages(), None)


def _sweep(
    job: SweepJob,
    choice: DeviceChoice,
    world: World,
    progress: SweepProgress,
    show_data: Callable[[DataReport], None] | None,
) -> SweepResult:
    given = job.run
    job = replace(job, resume=resumes(given, job.resume, world, progress.message))
    world.on_main(
        lambda: check_run_directory(given.out, given.name, resume=job.resume), "the run directory"
    )
    job = with_recorded_steps(job)
    check_same_sweep(job)
    source = find_model(job.model)
    # An architecture that nothing runs is refused before the data are read.
    recorded = world.on_main(partial(_recorded_implementation, job), "the recorded implementation")
    job = settled_task(job, source.folder, recorded, progress.message, choice.compute_dtype)
    base = settled_base(source.folder, job.base_weights, progress.message)
    job = replace(job, **vars(base))
    check_same_base(job)
    check_native_only(model_config(source.folder, job.implementation), base=base, fsdp=False)
    data = prepare_sweep(job, source.folder, progress, world)
    job = replace(job, train=job.train.with_steps(len(data.train)))
    check_same_sweep(job)  # with the steps that the epochs take
    progress.message(job.train.describe_length(len(data.train)))
    candidates = build_candidates(job.grid, job.lora, job.train)
    _show_data(job, source, data, progress, show_data)
    progress.message(f"{len(candidates)} candidates on {source.description}, {choice.reason}")
    _tell_idle(len(candidates), world, progress)
    with explain_out_of_memory(lambda: f"while the weights were loaded. {LOADING_ADVICE}"):
        model = load_language_model(
            source.folder,
            implementation=job.implementation,
            dtype=choice.compute_dtype,
            device=choice.device,
            base=job.base_weights,
        )
    model.requires_grad_(False)
    saved = read_saved_record(job, candidates)
    _, only = planned_base(source.folder, base)
    at_once, memory_plan = choose_stack_size(
        job, model, candidates, data, choice, progress, saved, world, only
    )
    described = replace(
        describe_job(job, source, data, choice, at_once, world),
        base_fingerprint=base_fingerprint(model),
        base_parameters=sum(n_values(p) for p in model.parameters()),
    )
    check_alike(alike(described, choice), world)
    name = job.run.name or default_name(source.name)
    if job.deterministic:
        progress.message("deterministic: PyTorch's deterministic algorithms, and the plain step")
    create = partial(create_run, job.run.out, name, resume=job.resume, record=described)
    with shared_run(world, create, progress.message) as run:
        check_is_shared(run, world, "sweep")
        run.on_trouble = progress.message
        context = build_context(
            job, candidates, model, data, choice, run, progress, memory_plan, world
        )
        record = open_record(job, context, at_once, saved)
        train_s = _train_all(context, record, data, source, job.grid.swept())
        return _choose_best(context, record, train_s)


def _show_data(
    job: SweepJob,
    source: ModelSource,
    data: PreparedData,
    progress: SweepProgress,
    show_data: Callable[[DataReport], None] | None,
) -> None:
    report = inspect_prepared(data, job.data, job.data_config)
    sizes = model_config(source.folder, job.implementation)
    excess = describe_excess(report.longest_tokens, sizes.max_position_embeddings)
    report.warnings += [excess] if excess else []
    if show_data is not None:
        show_data(report)
    elif excess:
        progress.message(f"note: {excess}")


def check_before_processes(job: SweepJob) -> None:
    """Raise before processes are started for what the job's base cannot be; no weights are read."""
    recorded = _recorded_implementation(job) if job.implementation == "auto" else None
    check_base(find_model(job.model).folder, recorded or job.implementation, job.base_weights)


def _recorded_implementation(job: SweepJob) -> ImplementationName | None:
    run = job.run
    return implementation_to_resume(run.out / str(run.name)) if job.resume else None


def _tell_idle(n_candidates: int, world: World, progress: SweepProgress) -> None:
    if world.size > n_candidates:
        progress.message(
            f"note: {world.size - n_candidates} of {world.size} processes have nothing to train: "
            f"there are {n_candidates} candidates"
        )


def _train_all(
    context: SweepContext,
    record: SweepRecord,
    data: PreparedData,
    source: ModelSource,
    swept: tuple[str, ...],
) -> float:
    """Train all candidates; return the seconds of their steps."""
    progress = context.progress

    def save(candidate: Candidate, tensors: TensorState) -> None:
        values = values_to_save(tensors)[0]
        folder = candidate_run(context.run, candidate).folder / "adapter"
        with single_adapter(context.model, candidate.lora, values) as adapted:
            save_adapter(adapted, folder, base_name=source.reference)
        data.tokenizer.save(folder)
        save_prompt_format(data.prompts, folder)

    progress.start(swept)
    try:
        with (
            StopRequests(progress.message) as stop,
            explain_out_of_memory(lambda: _memory_message(context, record)),
        ):
            return train_rounds(context, record, stop, save)
    finally:
        progress.stop()


def _choose_best(context: SweepContext, record: SweepRecord, train_s: float) -> SweepResult:
    """Copy the best candidate's adapter and write the outcome.

    Raises TrainingError if every candidate has failed.
    """
    run, world, best = context.run, context.world, find_best(record.candidates)
    if best is None:
        reasons = [f"{c.name}: {c.reason}" for c in record.candidates if c.reason]
        heading = f"Cannot choose the best of {run.folder}: every candidate has failed."
        raise TrainingError(
            gather(reasons, heading, "Lower the learning rates, or look for damaged examples.")
        )
    world.on_main(lambda: _write_best(context, best, train_s), "the best adapter")
    peaks = world.gather(peak_memory_bytes(context.choice.device), "the memory of all")
    return SweepResult(
        folder=run.folder,
        best=run.folder / BEST,
        candidates=rank(record.candidates),
        train_s=train_s,
        peak_memory_bytes=max(peaks),
    )


def _write_best(context: SweepContext, best: CandidateState, train_s: float) -> None:
    own_runs = {c.name: candidate_run(context.run, c) for c in context.candidates}
    for own in own_runs.values():
        remove_candidate_state(own)
    _copy_best(own_runs[best.name].folder / "adapter", context.run.folder / BEST)
    write_outcome(context.run, SweepOutcome(best.name, best.result_loss, train_s))


def _copy_best(adapter: Path, best: Path) -> None:
    """Copy the best adapter, whole or not at all. Raises CheckpointError if the disk refuses."""
    building = best.with_name(f".{BEST}.building")
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir()
        for file in sorted(adapter.iterdir()):  # a copytree collects its errors without a reason
            shutil.copyfile(file, building / file.name)
        shutil.rmtree(best, ignore_errors=True)
        building.rename(best)
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        raise CheckpointError(
            f"{disk_error(best, error)} All candidates are trained and saved; the best is "
            f"{adapter}. --resume copies it."
        ) from error


def _memory_message(context: SweepContext, record: SweepRecord) -> str:
    peak_bytes = peak_memory_bytes(context.choice.device)
    fewer = max(1, record.at_once // 2)
    return (
        f"with {record.at_once} candidates at once, after a peak of {peak_bytes / 1e9:.2f} GB. "
        f"{context.memory_plan}. Try, in this order: --at-once {fewer}; more "
        f"--gradient-accumulation than {context.micro_batches} (the result stays the same); in a "
        "new sweep a shorter --max-length. --resume continues from the newest checkpoint, in "
        "smaller waves if --at-once asks for them."
    )
