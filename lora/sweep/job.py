"""The configuration of a sweep, its run record, and the check that a resumed one is the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from lora.config import BaseWeights, LoRAConfig, RunConfig, TrainConfig
from lora.data.prepare import PreparedData
from lora.data.record import describe_data
from lora.data.task import LoRATask
from lora.device import DeviceChoice
from lora.distributed.world import ALONE, World
from lora.errors import CheckpointError, ConfigError, gather
from lora.pretrained.sources import ModelSource
from lora.public.field_texts import documented
from lora.runs.read_record import describe_changes, read_run_record
from lora.runs.record import RUN_FILE, RunRecord, SweepSettings
from lora.sweep.grid import Candidate, Grid


@documented
@dataclass(frozen=True, kw_only=True)
class SweepJob(LoRATask):
    """A sweep: the task, the candidates, and how they train."""

    grid: Grid
    """The values whose combinations are the candidates."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Shared by all candidates; the grid's values replace those given here."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Shared by all candidates; the grid's values replace those given here."""
    run: RunConfig = field(default_factory=RunConfig)
    """A sweep uses out, name, device, fast, save, and the evaluation and save intervals."""
    at_once: int | None = None
    """Candidates trained together, on each device; None: as many as fit into memory."""
    halving: bool = False
    """Stop the worse half at a quarter and at half of the steps."""
    resume: bool = False
    """Continue the sweep of this name."""
    deterministic: bool = False
    """Repeat bit for bit on a GPU too: PyTorch's deterministic algorithms, and the plain step."""


def takes_fast(job: SweepJob) -> bool:
    """Whether the fast step may train the candidates."""
    return job.run.fast and not job.deterministic


def check_job(job: SweepJob, candidates: list[Candidate]) -> None:
    """Raise ConfigError for settings that a sweep cannot have."""
    _ = job.base_weights  # checks itself
    if job.at_once is not None and job.at_once < 1:
        raise ConfigError(f"Cannot sweep with at_once={job.at_once!r}. Allowed: an int ≥ 1.")
    if not job.resume:
        job.check_split()
        unused = [n for n in ("patience", "tensorboard") if getattr(job.run, n)]
        if unused:
            raise ConfigError(
                f"Cannot sweep with {' and '.join(unused)}: candidates train together to their "
                "last step, and have no TensorBoard files. Leave it out, or use lora finetune."
            )
        if job.run.parallel != "auto":
            raise ConfigError(
                f"Cannot sweep with parallel={job.run.parallel!r}: each candidate trains on one "
                "device. Leave it out, or use lora finetune."
            )
    if job.data_config.special_tokens:
        raise ConfigError(
            "Cannot sweep with special_tokens: the embedding rows of added tokens cannot train for "
            "several adapters at once yet. Leave them out, or use lora finetune."
        )
    if job.halving and len(candidates) < 4:
        raise ConfigError(
            f"Cannot use halving with {len(candidates)} candidates, because it halves them twice. "
            "Allowed: at least 4. Leave it out, or give more values."
        )


def sweep_settings(job: SweepJob) -> SweepSettings:
    """Return the settings that a resumed sweep must share."""
    grid = {name: list(values) for name, values in asdict(job.grid).items()}
    return SweepSettings(grid, job.halving, job.train.steps or 0)


def with_recorded_steps(job: SweepJob) -> SweepJob:
    """Return a resumed job that gives neither steps nor epochs with those of its record."""
    folder = job.run.out / str(job.run.name)
    is_given = job.train.steps is not None or job.train.epochs is not None
    if not job.resume or is_given or not (folder / RUN_FILE).is_file():
        return job
    saved = read_run_record(folder).sweep
    return job if saved is None else replace(job, train=replace(job.train, steps=saved.steps))


def check_same_sweep(job: SweepJob) -> None:
    """Raise CheckpointError if `job` resumes a run that is not the same sweep.

    Its number of steps is compared once it is known.
    """
    folder = job.run.out / str(job.run.name)
    if not job.resume or not (folder / RUN_FILE).is_file():
        return
    record, now = read_run_record(folder), asdict(sweep_settings(job))
    saved = record.sweep
    if saved is None:
        raise CheckpointError(
            f"Cannot resume {folder} as a sweep: its run.json is of another kind of run. Give the "
            "name of a sweep, or use lora finetune --resume."
        )
    faults = [
        f"{key}: {value} then, {now[key]} now"
        for key, value in asdict(saved).items()
        if value != now[key] and (key != "steps" or job.train.steps is not None)
    ]
    faults += describe_changes(record.run, vars(job.run), ["save"])
    _refuse(faults, folder)


def check_same_base(job: SweepJob) -> None:
    """Raise CheckpointError if `job` resumes a sweep whose base was stored otherwise.

    Once it is known how: a model's files may be quantised already.
    """
    folder = job.run.out / str(job.run.name)
    if not job.resume or not (folder / RUN_FILE).is_file():
        return
    record = read_run_record(folder)
    recorded = {"base_dtype": record.base_dtype or "auto", **(record.nf4 or {})}
    then, now = {**asdict(BaseWeights()), **recorded}, job.base_settings
    _refuse(
        [f"{key}: {then[key]} then, {now[key]} now" for key in now if then[key] != now[key]],
        folder,
    )


def _refuse(faults: list[str], folder: Path) -> None:
    if faults:
        advice = "Resume with the values it started with, or start a new sweep."
        heading = f"Cannot resume the sweep {folder} with other values:"
        raise CheckpointError(gather(faults, heading, advice))


def describe_job(
    job: SweepJob,
    source: ModelSource,
    data: PreparedData,
    choice: DeviceChoice,
    at_once: int,
    world: World = ALONE,
) -> RunRecord:
    """Return the sweep's record, without its base; the grid's settings are in `sweep` alone."""
    settings = sweep_settings(job)
    return RunRecord(
        kind="sweep",
        model=source.name,
        model_source=job.model,
        device=choice.reason,
        threads=torch.get_num_threads(),
        **job.recorded_base,
        implementation=job.implementation,
        deterministic=job.deterministic or None,
        world_size=None if world.is_alone else world.size,
        at_once=at_once,
        lora={k: v for k, v in asdict(job.lora).items() if k not in settings.grid},
        train={k: v for k, v in asdict(job.train).items() if k not in settings.grid},
        data_config=asdict(job.data_config),
        run=asdict(job.run),
        sweep=settings,
        data=describe_data(data, job.data, job.eval_data),
    )


def alike(record: RunRecord, choice: DeviceChoice) -> dict[str, object]:
    """Return what must be the same in all processes, by name."""
    named = (
        "base_fingerprint",
        "base_dtype",
        "nf4",
        "implementation",
        "deterministic",
        "at_once",
        "lora",
        "train",
        "data_config",
        "sweep",
    )
    return {
        **{name: getattr(record, name) for name in named},
        "data": record.data.fingerprint,
        "validation data": record.data.held_out_fingerprint,
        "compute dtype": str(choice.compute_dtype),
    }


def describe_candidate(sweep: RunRecord, candidate: Candidate) -> RunRecord:
    """Return the record of one candidate of a sweep."""
    return replace(
        sweep,
        kind="candidate",
        method="lora",
        learning_rate=candidate.rate,
        lora=asdict(candidate.lora),
        train=asdict(candidate.train),
        sweep=None,
        world_size=None,  # one process has trained it
    )
