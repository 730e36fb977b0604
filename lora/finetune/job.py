"""A finetune job's configuration, its result, and its run record."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from lora.adapters.peft_files import fingerprint_adapter
from lora.config import (
    DataConfig,
    LoRAConfig,
    MemoryConfig,
    RunConfig,
    TrainConfig,
)
from lora.data.inspection_report import DataReport
from lora.data.prepare import PreparedData
from lora.data.record import describe_data
from lora.data.task import LoRATask
from lora.device import DeviceChoice
from lora.distributed.world import ALONE, World
from lora.errors import ConfigError
from lora.finetune.memory import RunMemory
from lora.pretrained.sources import ModelSource
from lora.public.field_texts import documented
from lora.runs.record import RunRecord
from lora.settings.base import Settings
from lora.training.job import TrainResult

GROUPS: dict[str, type[Settings]] = {
    "lora": LoRAConfig,
    "train": TrainConfig,
    "data_config": DataConfig,
    "run": RunConfig,
    "memory": MemoryConfig,
}
"""The fields of a job that are groups of settings. `memory` is also a field of MemoryConfig."""


@documented
@dataclass(frozen=True, kw_only=True)
class FinetuneJob(LoRATask):
    """What to fine-tune, on which data, and how."""

    lora: LoRAConfig | None = field(default_factory=LoRAConfig)
    """None trains all weights: full fine-tuning."""
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    from_adapter: Path | None = None
    """Continue training this adapter instead of a new one; `lora` is then left as it is."""
    resume: bool = False
    """Continue the run called `run.name` from its newest checkpoint."""
    deterministic: bool = False
    """Give the same bits again on a GPU too: torch's deterministic algorithms, the plain step."""

    def __post_init__(self) -> None:
        if isinstance(self.from_adapter, str):  # a path as Python's users write it
            object.__setattr__(self, "from_adapter", Path(self.from_adapter))
        for name, kind in GROUPS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) and not (name == "lora" and value is None):
                allowed = f"a {kind.__name__}" + (", or None" if name == "lora" else "")
                raise ConfigError(f"Cannot use {name}={value!r}. Allowed: {allowed}.")

    @property
    def is_full(self) -> bool:
        """Whether all weights train, without LoRA."""
        return self.lora is None and self.from_adapter is None

    @property
    def allows_fast_step(self) -> bool:
        """Whether the hand-written or captured step may train the model."""
        return self.run.fast and not self.deterministic

    @property
    def directory(self) -> Path:
        """The run directory to resume; not where a new run without a name is written."""
        return self.run.out / str(self.run.name)


@dataclass(frozen=True)
class FinetuneResult:
    """Where the results are, and what was measured."""

    folder: Path
    """The run directory."""
    saved: Path
    """The directory of the adapter, or of the whole model after full fine-tuning."""
    result: TrainResult
    memory: RunMemory
    """Planned and measured peak memory."""


def check_base_dtype(job: FinetuneJob) -> None:
    """Raise ConfigError for a base that is stored as it cannot be, or not in full fine-tuning."""
    if job.base_weights.is_quantised and job.is_full:
        raise ConfigError(
            f"Cannot use base_dtype={job.base_dtype!r} with full fine-tuning: updates of weights "
            f"in {job.base_dtype} would be rounded away. Train with LoRA, or leave base_dtype out."
        )


def check_from_adapter(job: FinetuneJob) -> None:
    """Raise ConfigError if `job` has LoRA settings beside an adapter, which has its own."""
    if job.from_adapter is None or job.lora is None:
        return
    own, default = vars(job.lora), vars(LoRAConfig())
    given = [name for name, value in own.items() if value != default[name]]
    if given:
        raise ConfigError(
            f"Cannot use {', '.join(given)} with from_adapter={str(job.from_adapter)!r}: an "
            "adapter is trained on with its own rank, alpha, dropout and targets. Leave "
            "them out, or train a new adapter."
        )


def describe_job(
    job: FinetuneJob,
    source: ModelSource,
    data: PreparedData,
    report: DataReport,
    choice: DeviceChoice,
    world: World = ALONE,
) -> RunRecord:
    """Return the record of a run before its model is loaded."""
    return RunRecord(
        kind="finetune",
        method="full" if job.is_full else "lora",
        model=source.name,
        model_source=job.model,
        device=choice.reason,
        threads=torch.get_num_threads(),
        from_adapter=None if job.from_adapter is None else str(job.from_adapter),
        from_adapter_fingerprint=(
            None if job.from_adapter is None else fingerprint_adapter(job.from_adapter)
        ),
        **job.recorded_base,
        implementation=job.implementation,
        deterministic=job.deterministic or None,
        world_size=None if world.is_alone else world.size,
        lora=None if job.lora is None else asdict(job.lora),
        train=asdict(job.train),
        data_config=asdict(job.data_config),
        run=asdict(job.run),
        data=replace(
            describe_data(data, job.data, job.eval_data),
            counts=asdict(data.train_encoded.counts),
            warnings=tuple(report.warnings),
        ),
    )
