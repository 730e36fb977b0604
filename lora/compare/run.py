"""A comparison: LoRA, full fine-tuning and optionally PEFT, from the same base on the same data.

    runs/NAME/
      run.json       configuration           base.json   evaluation of the base model
      rates/         trials of learning rates: METHOD.json, and the runs
      timing/        a few steps of each method, for members that get the same time
      members/NAME/  a run directory each, with member.json when it is done
      compare.json   the result

`lora.report` draws the members' losses and writes a page from these files. Each member trains in a
subprocess, so that its peak memory is its own. Finished stages are kept: a comparison that was
killed resumes with the member that was training, from its newest checkpoint.
"""

from __future__ import annotations

import gc
import shutil
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from lora.compare.config import CompareConfig, check_same_comparison, with_recorded_steps
from lora.compare.results import (
    BaseResult,
    MemberResult,
    RateChoice,
    StepTiming,
    base_notes,
    best_learning_rate,
    build_member,
    check_same_data,
    edge_note,
    start_loss_notes,
)
from lora.compare.target import ComparisonTarget, MemberTask, remove_weights, short_run
from lora.compare.together import group_of_subprocesses, is_begun
from lora.distributed.devices import check_batch
from lora.distributed.one_run import check_is_shared, resumes, shared_run
from lora.distributed.start import joined
from lora.distributed.world import World
from lora.errors import ConfigError, TrainingError
from lora.runs.comparison_record import (
    MEMBERS,
    METHOD_NAMES,
    Comparison,
    Member,
    RateTrial,
    write_comparison,
)
from lora.runs.directory import Run, check_run_directory, create_run, default_name
from lora.runs.progress import NoProgress, Progress
from lora.runs.read_record import read_record_file, step_times
from lora.runs.record import Method, RunRecord
from lora.runs.subprocesses import run_in_subprocess

BASE_FILE, MEMBER_FILE, RATES, TIMING = "base.json", "member.json", "rates", "timing"
TIMED_STEPS, UNTIMED_STEPS = 8, 2
"""Of the short run that measures the time per step; the first, slower ones are left out."""
ProgressOf = Callable[[str], Progress]
"""Makes the progress of one stage, such as a member's training, from its title."""
RecordT = TypeVar("RecordT")


@dataclass(frozen=True)
class CompareResult:
    """The run directory of a comparison, and its record."""

    folder: Path
    comparison: Comparison


@dataclass(frozen=True)
class _ComparisonJob:
    """A comparison whose run directory is open."""

    target: ComparisonTarget
    config: CompareConfig
    run: Run
    progress_of: ProgressOf
    world: World

    def call(self, title: str, stage: Callable[..., Any], *arguments: Any) -> Any:
        """Return `stage(*arguments, progress)`, from a subprocess if members are isolated."""
        return _call(self.config, self.world, self.progress_of(title), stage, *arguments)

    def on_main(self, function: Callable[[], Any]) -> Any:
        """Return what `function` returns on rank 0, which alone calls it."""
        return self.world.on_main(function, "rank 0 in the run directory")

    def once(self, name: str, kind: type[RecordT], make: Callable[[], RecordT]) -> RecordT:
        """Return the record in the JSON file `name`; where there is none, make and write it.

        All processes make it together, and that of rank 0 is written.
        """
        path = self.run.folder / name
        if not self.on_main(path.is_file):
            made = make()
            self.on_main(lambda: self._write(path, made))
        record: RecordT = self.on_main(lambda: read_record_file(kind, path))
        return record

    def _write(self, path: Path, record: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        name = str(path.relative_to(self.run.folder))
        self.run.write_json(name, asdict(record))  # type: ignore[call-overload]


def compare(
    target: ComparisonTarget,
    config: CompareConfig | None = None,
    progress_of: ProgressOf = lambda title: NoProgress(),
) -> CompareResult:
    """Train every member from the same base on the same batches, and evaluate all in the same way.

    Raises ConfigError, DataError, ModelError or DependencyError for what cannot work, before
    anything is written; TrainingError if a member fails; Interrupted after a signal. What is
    finished by then is kept for `resume`.

    Processes that torchrun has started train each member together, each on its own GPU.
    """
    config = config or CompareConfig()
    target.check(config.methods, config.train)
    with joined(torch.device("cpu")) as world:  # members use the GPUs, in subprocesses
        shown = progress_of if world.is_main else lambda title: NoProgress()
        return _compare(target, config, shown, world)


def _compare(
    target: ComparisonTarget, config: CompareConfig, progress_of: ProgressOf, world: World
) -> CompareResult:
    _check_processes(config, world)
    message, given = progress_of("compare").message, config.run
    config = replace(config, resume=resumes(given, config.resume, world, message))
    world.on_main(
        lambda: check_run_directory(given.out, given.name, resume=config.resume),
        "the run directory",
    )
    config = with_recorded_steps(config)
    if config.train.steps is not None:  # else once the data have told how many there are
        check_same_comparison(config, {**config.described(), **target.described()})
    base = _measure_base(target, config, progress_of, world)
    config = _with_steps(config, base)
    if base.n_sequences is not None:
        message(config.train.describe_length(base.n_sequences))
    described = {**config.described(), **target.described()}
    check_same_comparison(config, described)
    name = config.run.name or default_name(f"compare-{base.name}")
    record = RunRecord(
        kind="compare",
        compare=described,
        model=base.name,
        device=base.device,
        implementation=base.implementation,
        data=target.data_record(),
        run=asdict(config.run),  # directory and intervals: may change when it is resumed
        world_size=None if world.is_alone else world.size,
    )
    create = partial(create_run, config.run.out, name, resume=config.resume, record=record)
    with shared_run(world, create, message) as run:
        check_is_shared(run, world, "compare")
        job = _ComparisonJob(target.with_base(base), config, run, progress_of, world)
        job.once(BASE_FILE, BaseResult, lambda: base)
        rates = {method: _choose_rate(job, method) for method in config.methods}
        members: list[Member] = []
        for method in config.methods:
            steps = _choose_steps(job, method, rates[method], members)
            members.append(_run_member(job, method, rates[method], steps, base))
        return _finish(job, base, members, rates)


def _check_processes(config: CompareConfig, world: World) -> None:
    """Raise ConfigError for what several processes cannot do."""
    if world.is_alone:
        return
    check_batch(config.train, world)
    if not config.isolated:
        raise ConfigError(
            f"Cannot compare with isolated=False in {world.size} processes: they train each member "
            "together, in a subprocess each. Leave it out."
        )


def _with_steps(config: CompareConfig, base: BaseResult) -> CompareConfig:
    """Return the settings with the number of steps, which all members share."""
    if config.train.steps is not None:
        return config
    if base.n_sequences is None:
        raise ConfigError(
            f"Cannot compare on {base.name}: the number of training sequences is not known, and no "
            "number of steps is given. Give steps."
        )
    return replace(config, train=config.train.with_steps(base.n_sequences))


def _measure_base(
    target: ComparisonTarget, config: CompareConfig, progress_of: ProgressOf, world: World
) -> BaseResult:
    """Return the evaluation of the base; a resumed comparison reads the one it began with."""
    if config.resume:
        path = config.run.out / str(config.run.name) / BASE_FILE
        former: BaseResult | None = world.on_main(
            lambda: read_record_file(BaseResult, path), "the evaluation of the base"
        )
        if former is not None:
            return former
    base: BaseResult = _call(
        config, world, progress_of("base"), target.measure_base, config.train, config.run
    )
    return world.from_main(base, "the evaluation of the base")


def _call(
    config: CompareConfig,
    world: World,
    progress: Progress,
    stage: Callable[..., Any],
    *arguments: Any,
) -> Any:
    if config.isolated:
        group = group_of_subprocesses(world)
        result = run_in_subprocess(stage, *arguments, progress=progress, environment=group)
        world.gather(None, "the subprocesses of all")  # nothing is removed while one reads it
        return result
    gc.collect()  # the former member's tensors must not count towards this one's peak
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return stage(*arguments, progress)


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

    def choose() -> RateChoice:
        template = MemberTask(
            method=method,
            train=replace(config.train, steps=config.steps_tried, learning_rate=None),
            run=replace(config.run, out=job.run.folder / RATES, name=None),
            evaluate=False,
        )
        title = f"learning rates of {METHOD_NAMES[method]}"
        trials: list[RateTrial] = job.call(title, job.target.try_rates, template, to_try)
        best = best_learning_rate(trials)
        if best is None:
            raise TrainingError(
                f"Cannot choose a learning rate for {METHOD_NAMES[method]}: all {len(to_try)} "
                f"trials failed, from {min(to_try):g} to {max(to_try):g}. Try lower ones."
            )
        return RateChoice(best, "sweep", tuple(trials), config.steps_tried)

    return job.once(f"{RATES}/{method}.json", RateChoice, choose)


def _choose_steps(
    job: _ComparisonJob, method: Method, rate: RateChoice, members: list[Member]
) -> int:
    """Return the member's steps: the comparison's, or as many as take LoRA's time."""
    config = job.config
    if config.same == "steps" or method == "lora":
        return config.train.n_steps

    def measure() -> StepTiming:
        task = MemberTask(
            method=method,
            train=replace(config.train, steps=TIMED_STEPS, learning_rate=rate.learning_rate),
            run=short_run(replace(config.run, out=job.run.folder / TIMING), method, TIMED_STEPS),
            evaluate=False,
        )
        job.on_main(lambda: shutil.rmtree(task.folder, ignore_errors=True))
        job.call(f"time per step of {METHOD_NAMES[method]}", job.target.run_member, task)
        times: list[float] = job.on_main(lambda: list(step_times(task.folder)))
        step_s = statistics.median(times[UNTIMED_STEPS:])
        job.on_main(lambda: remove_weights(task.folder))
        lora = members[0]  # `CompareConfig` sees to it
        return StepTiming(step_s, max(1, round(lora.train_s / step_s)))

    return job.once(f"{TIMING}/{method}.json", StepTiming, measure).steps


def _run_member(
    job: _ComparisonJob, method: Method, rate: RateChoice, steps: int, base: BaseResult
) -> Member:
    """Return a member's record: trained now, resumed, or finished before."""
    folder = job.run.folder / MEMBERS / method

    def train() -> MemberResult:
        resume = job.on_main(lambda: is_begun(folder))
        out = job.run.folder / MEMBERS
        task = MemberTask(
            method=method,
            train=replace(job.config.train, steps=steps, learning_rate=rate.learning_rate),
            run=replace(job.config.run, out=out, name=method, keep_checkpoints=1, patience=0),
            resume=resume,
        )
        result: MemberResult = job.call(METHOD_NAMES[method], job.target.run_member, task)
        return result

    result = job.once(f"{MEMBERS}/{method}/{MEMBER_FILE}", MemberResult, train)
    job.on_main(lambda: shutil.rmtree(folder / "checkpoints", ignore_errors=True))
    return build_member(method, folder, rate, result, base.measured)


def _finish(
    job: _ComparisonJob,
    base: BaseResult,
    members: list[Member],
    rates: dict[Method, RateChoice],
) -> CompareResult:
    """Check that the members can be compared, and write the record."""
    run, config = job.run, job.config
    check_same_data(run.folder, members)
    has_trials = any(rate.rate_chosen == "sweep" for rate in rates.values())
    own = {method: rate for method, rate in rates.items() if method != "peft"}
    notes = [note for method, rate in own.items() if (note := edge_note(method, rate))]
    notes += base_notes(members, base)
    notes += start_loss_notes(run.folder, members, base)
    if not config.isolated and "cuda" not in base.device:
        notes.append("all members ran in one process: a peak memory includes the members before")
    comparison = Comparison(
        base=base.name,
        members=tuple(members),
        same=config.same,
        seed=config.train.seed,
        base_eval_loss=base.eval_loss,
        base_samples=base.measured.samples,
        device=base.device,
        rate_steps=config.steps_tried if has_trials else None,
        notes=tuple(dict.fromkeys(notes)),
    )
    job.on_main(lambda: write_comparison(run, comparison))
    return CompareResult(run.folder, comparison)
