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
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from lora.adapters.fingerprint import base_fingerprint
from lora.adapters.save_load import save_adapter
from lora.data.inspection import inspect_prepared
from lora.data.inspection_report import DataReport
from lora.data.prepare import PreparedData
from lora.data.prompting.prompt_format import save_prompt_format
from lora.decoder.families import decoder_config
from lora.device import (
    choose_device,
    deterministic_algorithms,
    peak_memory_bytes,
)
from lora.errors import (
    CheckpointError,
    Interrupted,
    TrainingError,
    gather,
)
from lora.pretrained.hf_files import read_config
from lora.pretrained.hf_weights import load_decoder
from lora.pretrained.positions import why_beyond_positions
from lora.pretrained.sources import ModelSource, find_model
from lora.runs.directory import check_run_directory, create_run, default_name
from lora.runs.disk import disk_error
from lora.runs.interrupts import StopRequests
from lora.runs.sweep_record import (
    CandidateState,
    SweepOutcome,
    SweepRecord,
    WaveTiming,
    append_wave_timing,
    find_best,
    rank,
    write_outcome,
    write_sweep_record,
)
from lora.stacked.apply import single_adapter
from lora.sweep.context import SweepContext, candidate_run
from lora.sweep.grid import Candidate, build_candidates
from lora.sweep.halving import halve_reached_rungs, next_group
from lora.sweep.job import SweepJob, check_job, check_same_sweep, describe_job, with_recorded_steps
from lora.sweep.progress import NoSweepProgress, SweepProgress
from lora.sweep.setup import (
    build_context,
    choose_stack_size,
    open_record,
    prepare_sweep,
    read_saved_record,
)
from lora.sweep.wave import TrainedWave, finish_wave, train_wave
from lora.sweep.wave_checkpoint import (
    TensorState,
    load_wave,
    remove_candidate_state,
    split_wave,
    values_to_save,
)
from lora.sweep.wave_loop import WavePlan
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
    """Seconds in steps of this process."""
    peak_memory_bytes: int


def sweep(
    job: SweepJob,
    progress: SweepProgress | None = None,
    *,
    show_data: Callable[[DataReport], None] | None = None,
) -> SweepResult:
    """Train all candidates of `job`, save their adapters, and choose the best.

    Raises ConfigError, DataError or ModelError for a job that cannot run, before anything is
    written; TrainingError if every candidate failed; Interrupted after a signal, the state saved.
    """
    progress = progress or NoSweepProgress()
    candidates = build_candidates(job.grid, job.lora, job.train)
    check_job(job, candidates)
    check_run_directory(job.run.out, job.run.name, resume=job.resume)
    job = with_recorded_steps(job)
    check_same_sweep(job)
    choice = choose_device(job.run.device, job.train.precision)
    source = find_model(job.model)
    # An unknown architecture is refused before the data are read.
    decoder_config(read_config(source.folder))
    data = prepare_sweep(job, source.folder, progress)
    job = replace(job, train=job.train.with_steps(len(data.train)))
    check_same_sweep(job)  # with the steps that the epochs take
    progress.message(job.train.describe_length(len(data.train)))
    candidates = build_candidates(job.grid, job.lora, job.train)
    report = inspect_prepared(data, job.data, job.data_config)
    excess = why_beyond_positions(source.folder, report.longest_tokens)
    report.warnings += [excess] if excess else []
    if show_data is not None:
        show_data(report)
    elif excess:
        progress.message(f"note: {excess}")
    progress.message(f"{len(candidates)} candidates on {source.description}, {choice.reason}")
    with explain_out_of_memory(lambda: f"while the weights were loaded. {LOADING_ADVICE}"):
        model = load_decoder(source.folder, dtype=choice.compute_dtype, device=choice.device)
    model.requires_grad_(False)
    saved = read_saved_record(job, candidates)
    at_once, memory_plan = choose_stack_size(job, model, candidates, data, choice, progress, saved)
    described = replace(
        describe_job(job, source, data, choice, at_once),
        base_fingerprint=base_fingerprint(model),
        base_parameters=sum(p.numel() for p in model.parameters()),
    )
    name = job.run.name or default_name(source.name)
    if job.deterministic:
        progress.message("deterministic: PyTorch's deterministic algorithms, and the plain step")
    with (
        deterministic_algorithms() if job.deterministic else nullcontext(),
        create_run(job.run.out, name, resume=job.resume, record=described) as run,
    ):
        run.on_trouble = progress.message
        if run.note:
            progress.message(run.note)
        context = build_context(job, candidates, model, data, choice, run, progress, memory_plan)
        record = open_record(job, context, at_once, saved)
        train_s = _train_all(context, record, data, source, job.grid.swept())
        return _choose_best(context, record, train_s)


def _train_all(
    context: SweepContext,
    record: SweepRecord,
    data: PreparedData,
    source: ModelSource,
    swept: tuple[str, ...],
) -> float:
    """Train wave after wave until no candidate is left; return the seconds of their steps."""
    progress, train_s = context.progress, 0.0

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
            while (plan := _next_wave(context, record)) is not None:
                train_s += _run_wave(context, record, plan, stop, save)
    finally:
        progress.stop()
    return train_s


def _next_wave(context: SweepContext, record: SweepRecord) -> WavePlan | None:
    """Return the wave to train next, an interrupted one first; None when all is done."""
    candidates, message = context.candidates, context.progress.message
    saved = load_wave(context, record)
    if saved is not None and len(saved.position.numbers) > record.at_once:
        split_wave(context, record, saved)
    elif saved is not None:
        position = saved.position
        message(f"resuming {len(position.numbers)} candidates at step {position.wave_step}")
        return WavePlan([candidates[n - 1] for n in position.numbers], position.until, saved)
    stopped = halve_reached_rungs(record)
    if stopped:
        message(f"halving stops {', '.join(c.name for c in stopped)}")
        write_sweep_record(context.run, record)
    group = next_group(record)
    return None if group is None else WavePlan([candidates[n] for n in group[0]], group[1])


def _run_wave(
    context: SweepContext,
    record: SweepRecord,
    plan: WavePlan,
    stop: StopRequests,
    save: Callable[[Candidate, TensorState], None],
) -> float:
    """Train one wave and record it; return the seconds of its steps.

    Raises Interrupted after a signal, the state saved.
    """
    began_s = time.perf_counter()
    wave = train_wave(context, record, plan, stop)
    if not wave.is_over:
        raise Interrupted(_interrupted_message(context, wave, stop), stop.exit_code)
    finish_wave(context, record, wave, save)
    timing = WaveTiming(
        step=record.steps_taken,
        train_s=wave.train_s,
        timed_steps=wave.timed_steps,
        peak_memory_bytes=peak_memory_bytes(context.choice.device),
        wave_s=time.perf_counter() - began_s,
        candidates=[candidate.name for candidate in plan.candidates],
        until=plan.until,
    )
    append_wave_timing(context.run, timing)
    if stop.received is not None and next_group(record) is not None:
        raise Interrupted(_interrupted_message(context, wave, stop), stop.exit_code)
    return wave.train_s


def _choose_best(context: SweepContext, record: SweepRecord, train_s: float) -> SweepResult:
    """Copy the best candidate's adapter and write the outcome.

    Raises TrainingError if every candidate has failed.
    """
    run, best = context.run, find_best(record.candidates)
    if best is None:
        reasons = [f"{c.name}: {c.reason}" for c in record.candidates if c.reason]
        heading = f"Cannot choose the best of {run.folder}: every candidate has failed."
        raise TrainingError(
            gather(reasons, heading, "Lower the learning rates, or look for damaged examples.")
        )
    own_runs = {c.name: candidate_run(run, c) for c in context.candidates}
    for own in own_runs.values():
        remove_candidate_state(own)
    _copy_best(own_runs[best.name].folder / "adapter", run.folder / BEST)
    write_outcome(run, SweepOutcome(best.name, best.result_loss, train_s))
    return SweepResult(
        folder=run.folder,
        best=run.folder / BEST,
        candidates=rank(record.candidates),
        train_s=train_s,
        peak_memory_bytes=peak_memory_bytes(context.choice.device),
    )


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


def _interrupted_message(context: SweepContext, wave: TrainedWave, stop: StopRequests) -> str:
    name = stop.received.name if stop.received else ""
    return (
        f"{name} stopped {context.run.folder} after step {wave.step} of a wave of "
        f"{len(wave.members)} candidates; its state is saved. Resume with --resume."
    )


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
