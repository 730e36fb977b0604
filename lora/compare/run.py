"""LoRA beside full fine-tuning, and beside PEFT: the same base, data, order, steps or time.

    runs/NAME/
      run.json       what was asked            base.json   what the base does before
      rates/         tries of learning rates: METHOD.json, and the runs
      members/NAME/  an ordinary run's folder each, with member.json when it is done
      compare.json   all that was found

`lora.report` draws the losses of the members and writes a page from what stands there.
Each member trains in a process of its own, so that each peak of memory is its own. What is done is
kept: a comparison that was killed goes on with the member that was under way, from its checkpoint.
"""

from __future__ import annotations

import gc
import math
import shutil
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from lora.compare.config import CompareConfig, check_same_comparison
from lora.compare.record import (
    MEMBERS,
    METHOD_NAMES,
    Comparison,
    Member,
    Method,
    RateChoice,
    RateTrial,
    best_rate,
    build_member,
    edge_note,
    rate_choice_from,
)
from lora.compare.target import (
    BaseResult,
    ComparisonTarget,
    MemberTask,
    base_result_from,
    member_result_from,
    remove_weights,
    short_run,
)
from lora.errors import CheckpointError, TrainingError
from lora.runs.directory import Run, create_run, default_name
from lora.runs.disk import read_json, read_rows, reading
from lora.runs.progress import NoProgress, Progress
from lora.runs.read_record import step_times
from lora.runs.record import RunRecord
from lora.runs.subprocesses import run_in_subprocess

BASE_FILE, MEMBER_FILE, RATES, TIMING = "base.json", "member.json", "rates", "timing"
TIMED_STEPS, UNTIMED_STEPS = 8, 2
"""Of the short run that says how long a step is; the first are left out."""
MAX_START_LOSS_DIFFERENCE = 0.02
"""Relative difference of losses before the first step, in bf16 too."""
ProgressOf = Callable[[str], Progress]
MadeT = TypeVar("MadeT")


@dataclass(frozen=True)
class CompareResult:
    """Where the results are, and what they are."""

    folder: Path
    comparison: Comparison


@dataclass(frozen=True)
class _ComparisonJob:
    """A comparison that is under way."""

    target: ComparisonTarget
    config: CompareConfig
    run: Run
    progress_of: ProgressOf

    def call(self, title: str, task: Callable[..., Any], *arguments: Any) -> Any:
        """Return `task(*arguments, progress)`, from a process of its own unless told otherwise."""
        return _call(self.config, self.progress_of(title), task, *arguments)

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the JSON file `name` of the folder, made first if it is not there."""
        path = self.run.folder / name
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.run.write_json(name, make())
        found: dict[str, Any] = read_json(path)
        return found

    def once_as(
        self,
        name: str,
        make: Callable[[], dict[str, Any]],
        build: Callable[[dict[str, Any]], MadeT],
    ) -> MadeT:
        """Return what `build` makes of the JSON file `name`, made first if it is not there."""
        values = self.once(name, make)
        with reading(self.run.folder / name):
            return build(values)


def compare(
    target: ComparisonTarget,
    config: CompareConfig | None = None,
    progress_of: ProgressOf = lambda title: NoProgress(),
) -> CompareResult:
    """Train each member from the same base on the same batches, and measure all in the same way.

    `progress_of` makes the progress of one part, a member's training for example, from its title.

    Raises ConfigError, DataError, ModelError or DependencyError for what cannot work, before
    anything is written; TrainingError if a member fails; Interrupted after a signal. What is done
    by then is kept for `resume`.
    """
    config = config or CompareConfig()
    target.check(config.methods, config.train)
    described = {**config.described(), **target.described()}
    check_same_comparison(config, described)
    base = _measure_base(target, config, progress_of)
    name = config.run.name or default_name(f"compare-{base.name}")
    record = RunRecord(
        kind="compare",
        compare=described,
        model=base.name,
        device=base.device,
        run=asdict(config.run),  # where and how often: may change when it is resumed
    )
    with create_run(config.run.out, name, resume=config.resume, record=record) as run:
        job = _ComparisonJob(target, config, run, progress_of)
        job.once(BASE_FILE, lambda: asdict(base))
        rates = {method: _choose_rate(job, method) for method in config.methods}
        members: list[Member] = []
        for method in config.methods:
            steps = _choose_steps(job, method, rates[method], members)
            members.append(_run_member(job, method, rates[method], steps, base))
        return _finish(job, base, members, rates)


def _measure_base(
    target: ComparisonTarget, config: CompareConfig, progress_of: ProgressOf
) -> BaseResult:
    """Return what the base does; that of a resumed comparison is read."""
    kept = config.run.out / str(config.run.name) / BASE_FILE
    if config.resume and kept.is_file():
        with reading(kept):
            return base_result_from(read_json(kept))
    base: BaseResult = _call(
        config, progress_of("base"), target.measure_base, config.train, config.run
    )
    return base


def _call(
    config: CompareConfig, progress: Progress, task: Callable[..., Any], *arguments: Any
) -> Any:
    if config.isolated:
        return run_in_subprocess(task, *arguments, progress=progress)
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return task(*arguments, progress)


def _choose_rate(job: _ComparisonJob, method: Method) -> RateChoice:
    """Return the member's learning rate: the best of its trials, the given one, or the default."""
    config = job.config
    if method == "peft":  # it is LoRA too
        return _choose_rate(job, "lora")
    to_try = config.rates.to_try(method)
    if not to_try:
        is_full = method == "full"
        given = config.rates.full_learning_rate if is_full else config.train.learning_rate
        if given is not None:
            return RateChoice(given, "given")
        return RateChoice(config.default_rates[is_full], "default")

    def choose() -> dict[str, Any]:
        template = MemberTask(
            method=method,
            train=replace(config.train, steps=config.steps_tried, learning_rate=None),
            run=replace(config.run, out=job.run.folder / RATES, name=None),
            evaluate=False,
        )
        title = f"learning rates of {METHOD_NAMES[method]}"
        trials: list[RateTrial] = job.call(title, job.target.try_rates, template, to_try)
        best = best_rate(trials)
        if best is None:
            raise TrainingError(
                f"Cannot choose a learning rate for {METHOD_NAMES[method]}: all {len(to_try)} "
                f"trials failed, from {min(to_try):g} to {max(to_try):g}. Try lower ones."
            )
        return asdict(RateChoice(best, "sweep", tuple(trials), config.steps_tried))

    return job.once_as(f"{RATES}/{method}.json", choose, rate_choice_from)


def _choose_steps(
    job: _ComparisonJob, method: Method, rate: RateChoice, members: list[Member]
) -> int:
    """Return the member's steps: those of the comparison, or as many as LoRA's time holds."""
    config = job.config
    if config.same == "steps" or method == "lora":
        return config.train.steps

    def choose() -> dict[str, Any]:
        task = MemberTask(
            method=method,
            train=replace(config.train, steps=TIMED_STEPS, learning_rate=rate.learning_rate),
            run=short_run(replace(config.run, out=job.run.folder / TIMING), method, TIMED_STEPS),
            evaluate=False,
        )
        shutil.rmtree(task.folder, ignore_errors=True)
        job.call(f"time per step of {METHOD_NAMES[method]}", job.target.run_member, task)
        step_s = statistics.median(step_times(task.folder)[UNTIMED_STEPS:])
        remove_weights(task.folder)
        return {"step_s": step_s, "steps": max(1, round(members[0].train_s / step_s))}

    return job.once_as(f"{TIMING}/{method}.json", choose, lambda found: int(found["steps"]))


def _run_member(
    job: _ComparisonJob, method: Method, rate: RateChoice, steps: int, base: BaseResult
) -> Member:
    """Return the record of a member: trained now, resumed, or done before."""
    folder = job.run.folder / MEMBERS / method

    def train() -> dict[str, Any]:
        resume = (folder / "run.json").is_file()
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)  # killed before it began
        out = job.run.folder / MEMBERS
        task = MemberTask(
            method=method,
            train=replace(job.config.train, steps=steps, learning_rate=rate.learning_rate),
            run=replace(job.config.run, out=out, name=method, keep_checkpoints=1, patience=0),
            resume=resume,
        )
        return asdict(job.call(METHOD_NAMES[method], job.target.run_member, task))

    trained = job.once_as(f"{MEMBERS}/{method}/{MEMBER_FILE}", train, member_result_from)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return build_member(method, folder, rate, trained, base.measured)


def _finish(
    job: _ComparisonJob,
    base: BaseResult,
    members: list[Member],
    rates: dict[Method, RateChoice],
) -> CompareResult:
    run, config = job.run, job.config
    _check_same_order(run.folder, members, config)
    tried = any(rate.rate_chosen == "sweep" for rate in rates.values())
    own = {method: rate for method, rate in rates.items() if method != "peft"}
    notes = [note for method, rate in own.items() if (note := edge_note(method, rate))]
    notes += _note_other_beginnings(run.folder, members, base)
    if not config.isolated and "cuda" not in base.device:
        notes.append("all members ran in one process: the peaks of memory are not their own")
    comparison = Comparison(
        base=base.name,
        members=tuple(members),
        same=config.same,
        seed=config.train.seed,
        base_eval_loss=base.eval_loss,
        base_samples=base.measured.samples,
        device=base.device,
        rate_steps=config.steps_tried if tried else None,
        notes=tuple(dict.fromkeys(notes)),
    )
    comparison.write(run)
    return CompareResult(run.folder, comparison)


def _note_other_beginnings(folder: Path, members: list[Member], base: BaseResult) -> list[str]:
    """Return what to say of members whose loss before the first step is not the base's."""
    notes = []
    for member in members:
        rows = read_rows(folder / member.folder / "metrics.jsonl")
        first = next((row["eval_loss"] for row in rows if row.get("eval_loss")), base.eval_loss)
        if abs(first - base.eval_loss) > MAX_START_LOSS_DIFFERENCE * abs(base.eval_loss):
            notes.append(
                f"{METHOD_NAMES[member.method]} begins at a held-out loss of {first:.4f}, the base "
                f"has {base.eval_loss:.4f}: it does not compute what the others do"
            )
    return notes


def _check_same_order(folder: Path, members: list[Member], config: CompareConfig) -> None:
    """Raise CheckpointError if the members did not learn from the same data in the same order."""
    seen = {}
    for member in members:
        own = folder / member.folder
        data = read_json(own / "run.json").get("data")
        prints = None
        if isinstance(data, dict):
            prints = data.get("fingerprint"), data.get("held_out_fingerprint")
        rows = read_rows(own / "metrics.jsonl")
        first_skipped = min((row["step"] for row in rows if "skipped" in row), default=math.inf)
        counted = (row for row in rows if "tokens" in row and row["step"] < first_skipped)
        seen[member.name] = prints, {row["step"]: row["tokens"] for row in counted}
    (first, (prints, tokens)), *others = seen.items()
    for name, (other_prints, other_tokens) in others:
        shared = tokens.keys() & other_tokens.keys()
        if prints != other_prints or any(tokens[n] != other_tokens[n] for n in shared):
            raise CheckpointError(
                f"The members {first} and {name} of {folder} did not learn from the same rows in "
                "the same order: the data or the date that the chat template tells has changed "
                "between them. Begin a new comparison."
            )
