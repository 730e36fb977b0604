"""Train many adapters at once on one frozen base, and say which settings are best.

    runs/NAME/
      run.json      what was asked          sweep.json   what became of each candidate
      candidates/   by name: run.json, metrics.jsonl, adapter/
      best/         the adapter with the lowest held-out loss

`lora.report` draws the losses of the candidates and writes a page from what stands there.

Each candidate ends where `lora finetune` would bring it with the same settings, data and seed,
within floating-point noise.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora.adapters.fingerprint import base_fingerprint
from lora.adapters.save_load import save_adapter
from lora.data.inspection import inspect_prepared
from lora.data.inspection_report import DataReport
from lora.data.prepare import PreparedData
from lora.device import (
    choose_device,
    deterministic_algorithms,
    peak_memory_bytes,
)
from lora.errors import (
    Interrupted,
    TrainingError,
    gather,
)
from lora.pretrained.hf_weights import load_decoder
from lora.pretrained.sources import ModelSource, find_model
from lora.runs.directory import check_run_directory, create_run, default_name
from lora.runs.disk import reading
from lora.runs.interrupts import StopRequests
from lora.stacked.apply import single_adapter
from lora.sweep.grid import Candidate, build_candidates
from lora.sweep.job import SweepJob, check_job, check_same_sweep, describe_job
from lora.sweep.ledger import CandidateState, Ledger
from lora.sweep.progress import NoSweepProgress, SweepProgress
from lora.sweep.setup import (
    build_base,
    choose_stack_size,
    open_ledger,
    prepare_sweep,
    read_saved_ledger,
)
from lora.sweep.wave import (
    State,
    SweepBase,
    Wave,
    candidate_run,
    finish_wave,
    load_wave,
    split_wave,
)
from lora.training.out_of_memory import LOADING_ADVICE, explained

BEST = "best"


@dataclass(frozen=True)
class SweepResult:
    """Where the results are, and how the candidates ended, the best first."""

    folder: Path
    best: Path
    """The best candidate's adapter."""
    candidates: list[CandidateState]
    train_s: float
    """Seconds this process spent in steps."""
    peak_memory_bytes: int


def sweep(
    job: SweepJob,
    progress: SweepProgress | None = None,
    *,
    show_data: Callable[[DataReport], None] | None = None,
) -> SweepResult:
    """Run `job` to its end: train all candidates, save their adapters, and choose the best.

    Raises ConfigError, DataError or ModelError for what cannot work, before anything is written;
    TrainingError if no candidate came through; Interrupted after a signal, the state saved.
    """
    progress = progress or NoSweepProgress()
    candidates = build_candidates(job.grid, job.lora, job.train)
    check_job(job, candidates)
    check_run_directory(job.run.out, job.run.name, resume=job.resume)
    check_same_sweep(job)
    choice = choose_device(job.run.device, job.train.precision)
    source = find_model(job.model)
    data = prepare_sweep(job, source.folder, progress)
    report = inspect_prepared(data, job.data, job.data_config)
    if show_data is not None:
        show_data(report)
    progress.message(f"{len(candidates)} candidates on {source.name}, {choice.reason}")
    with explained(lambda: f"while the weights were loaded. {LOADING_ADVICE}"):
        model = load_decoder(source.folder, dtype=choice.compute_dtype, device=choice.device)
    model.requires_grad_(False)
    saved = read_saved_ledger(job, candidates)
    at_once, memory_plan = choose_stack_size(job, model, candidates, data, choice, progress, saved)
    described = describe_job(job, source, data, choice, at_once)
    described["base_fingerprint"] = base_fingerprint(model)
    described["base_parameters"] = sum(p.numel() for p in model.parameters())
    name = job.run.name or default_name(source.name)
    if job.deterministic:
        described["deterministic"] = True
        progress.message(
            "deterministic: torch's algorithms that repeat to the bit, and the plain step"
        )
    with (
        deterministic_algorithms() if job.deterministic else nullcontext(),
        create_run(job.run.out, name, resume=job.resume, described=described) as run,
    ):
        run.on_trouble = progress.message
        if run.note:
            progress.message(run.note)
        base = build_base(job, model, data, choice, run, progress, memory_plan)
        ledger = open_ledger(job, base, candidates, at_once, saved)
        return _run_all(base, ledger, candidates, data, source, job.grid.swept())


def _run_all(
    base: SweepBase,
    ledger: Ledger,
    candidates: list[Candidate],
    data: PreparedData,
    source: ModelSource,
    swept: tuple[str, ...],
) -> SweepResult:
    progress, train_s = base.progress, 0.0

    def save(candidate: Candidate, state: State) -> None:
        values = {n.removeprefix("value."): t for n, t in state.items() if n[:6] == "value."}
        folder = candidate_run(base.run, candidate).folder / "adapter"
        with single_adapter(base.model, candidate.lora, values) as adapted:
            save_adapter(adapted, folder, base_name=source.name)
        data.tokenizer.save(folder)

    progress.start(swept)
    try:
        with (
            StopRequests(progress.message) as stop,
            explained(lambda: _memory_message(base, ledger)),
        ):
            while (group := _next_wave(base, ledger, candidates)) is not None:
                train_s += _run_wave(base, ledger, *group, stop, save)
    finally:
        progress.stop()
    return _finish(base, ledger, candidates, train_s)


Group = tuple[list[Candidate], int, "tuple[State, dict[str, Any]] | None"]


def _next_wave(base: SweepBase, ledger: Ledger, candidates: list[Candidate]) -> Group | None:
    """Return who trains next, to which step, and the checkpoint to go on from if there is one."""
    saved = load_wave(base, ledger)
    with reading(base.run.folder / "checkpoints"):
        if saved is not None and len(saved[1]["numbers"]) > ledger.at_once:
            split_wave(base, ledger, candidates, *saved)
            saved = None
    if saved is not None:
        with reading(base.run.folder / "checkpoints"):
            members = [candidates[number - 1] for number in saved[1]["numbers"]]
            step, until = int(saved[1]["wave_step"]), int(saved[1]["until"])
        base.progress.message(f"going on from step {step} of {len(members)} at once")
        return members, until, saved
    before = {s.name for s in ledger.states if s.status == "stopped"}
    found = ledger.next_group()
    stopped = [s.name for s in ledger.states if s.status == "stopped" and s.name not in before]
    if stopped:
        base.progress.message(f"halving stops {', '.join(stopped)}")
        ledger.write(base.run)
    return None if found is None else ([candidates[n] for n in found[0]], found[1], None)


def _run_wave(
    base: SweepBase,
    ledger: Ledger,
    members: list[Candidate],
    until: int,
    saved: tuple[State, dict[str, Any]] | None,
    stop: StopRequests,
    save: Callable[[Candidate, State], None],
) -> float:
    """Train one wave and put it into the ledger; return the seconds its steps took.

    Raises Interrupted if a signal stopped it, its state saved.
    """
    began_s = time.perf_counter()
    with Wave(base, members, ledger, until) as wave:
        if saved is None:
            wave.begin()
        else:
            with reading(base.run.folder / "checkpoints"):
                wave.resume(*saved)
        resumed_step = wave.step
        wave.run(stop)
        states = wave.states()
    if not wave.is_over:
        raise Interrupted(_interrupted_message(base, wave, stop), stop.exit_code)
    for candidate, state, tensors in zip(members, wave.standings, states, strict=True):
        if state.status == "training":
            save(candidate, tensors)
    finish_wave(wave, states)
    took_s = time.perf_counter() - began_s
    row = {"step": ledger.steps_taken, "candidates": [c.name for c in members], "until": until}
    memory = peak_memory_bytes(base.choice.device)
    times = {"train_s": wave.train_s, "wave_s": took_s, "peak_memory_bytes": memory}
    times["timed_steps"] = wave.step - resumed_step  # those before a kill are in no row
    base.run.append_timing({**row, **times})
    if stop.received is not None and ledger.next_group() is not None:
        raise Interrupted(_interrupted_message(base, wave, stop), stop.exit_code)
    return wave.train_s


def _finish(
    base: SweepBase, ledger: Ledger, candidates: list[Candidate], train_s: float
) -> SweepResult:
    run, best = base.run, ledger.best()
    if best is None:
        reasons = [f"{s.name}: {s.reason}" for s in ledger.states if s.reason]
        advice = "Lower the learning rates, or look for damaged examples."
        raise TrainingError(gather(reasons, f"No candidate of {run.folder} came through:", advice))
    by_name = {candidate.name: candidate for candidate in candidates}
    for state in ledger.states:
        folder = candidate_run(run, by_name[state.name]).folder
        shutil.rmtree(folder / "state", ignore_errors=True)
    adapter = candidate_run(run, by_name[best.name]).folder / "adapter"
    building = run.folder / f".{BEST}.building"
    shutil.rmtree(building, ignore_errors=True)
    shutil.copytree(adapter, building)
    shutil.rmtree(run.folder / BEST, ignore_errors=True)
    building.rename(run.folder / BEST)
    result = SweepResult(
        folder=run.folder,
        best=run.folder / BEST,
        candidates=ledger.ranked(),
        train_s=train_s,
        peak_memory_bytes=peak_memory_bytes(base.choice.device),
    )
    shown = {"best": best.name, "eval_loss": best.eval_loss}
    run.write_json("result.json", {**shown, "train_s": train_s})
    return result


def _interrupted_message(base: SweepBase, wave: Wave, stop: StopRequests) -> str:
    name = stop.received.name if stop.received else ""
    return (
        f"{name} stopped {base.run.folder} after step {wave.step} of a wave of "
        f"{len(wave.candidates)}; it is saved. Give --resume to go on."
    )


def _memory_message(base: SweepBase, ledger: Ledger) -> str:
    peak_bytes, fewer = peak_memory_bytes(base.choice.device), max(1, ledger.at_once // 2)
    return (
        f"with {ledger.at_once} candidates at once, after a peak of {peak_bytes / 1e9:.2f} GB. "
        f"{base.memory_plan}. Try, in this order: --at-once {fewer}; more --micro-batches than "
        f"{base.micro_batches} (the result stays the same); in a new sweep a shorter --max-length. "
        "With --resume it goes on from its newest checkpoint, in smaller waves if asked to."
    )
