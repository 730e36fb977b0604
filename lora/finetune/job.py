"""What `lora.finetune` is asked for, what it gives back, and what its run's folder says of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from lora.config import BaseDtype, LoRAConfig, MemoryConfig, RunConfig, TrainConfig
from lora.data.prepare import PreparedData
from lora.data.reading.readers import Source
from lora.data.task import Task
from lora.device import DeviceChoice
from lora.errors import ConfigError, did_you_mean
from lora.finetune.memory import RunMemory
from lora.pretrained.sources import ModelSource
from lora.training.trainer import TrainResult


@dataclass(frozen=True, kw_only=True)
class FinetuneJob(Task):
    """What to fine-tune, on what, and how."""

    lora: LoRAConfig | None = field(default_factory=LoRAConfig)
    """None trains all weights: full fine-tuning."""
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    from_adapter: Path | None = None
    """Go on from this adapter instead of a fresh one; its settings replace `lora`."""
    resume: bool = False
    """Go on with the run of this name from its newest checkpoint."""
    base_dtype: BaseDtype = "auto"
    """How the frozen linears are kept: auto in the products' type; fp8 in eight bits, with a scale
    for each output."""
    deterministic: bool = False
    """Repeat to the bit on a GPU too: torch's deterministic algorithms, and the plain step."""


@dataclass(frozen=True)
class FinetuneResult:
    """Where the results are, and how the run ended."""

    folder: Path
    """The run's folder."""
    saved: Path
    """The adapter's folder in it, or the whole model's after full fine-tuning."""
    result: TrainResult
    memory: RunMemory
    """What was planned against what was measured."""


def check_base_dtype(job: FinetuneJob) -> None:
    """Raise ConfigError for a base dtype that is unknown, or that all weights cannot train in."""
    allowed = get_args(BaseDtype)
    if job.base_dtype not in allowed:
        near = did_you_mean(str(job.base_dtype), allowed)
        raise ConfigError(
            f"base_dtype={job.base_dtype!r}: allowed are {', '.join(allowed)}.{near} Change it."
        )
    if job.base_dtype == "fp8" and job.lora is None and job.from_adapter is None:
        raise ConfigError(
            "base_dtype='fp8' was asked for with full fine-tuning: weights of eight bits cannot "
            "train, their steps would be rounded away. Train through LoRA, or leave it out."
        )


def describe_job(
    job: FinetuneJob, source: ModelSource, data: PreparedData, choice: DeviceChoice
) -> dict[str, Any]:
    """Return what `run.json` says of a run before it begins, for programs and for a resume."""
    return {
        "model": source.name,
        "model_source": job.model,
        "device": choice.reason,
        "threads": torch.get_num_threads(),
        "data": {
            "source": _named(job.data),
            "eval_source": _named(job.eval_data),
            "examples": len(data.train_examples),
            "held_out_examples": len(data.validation_examples),
            "rows": len(data.train),
            "learned_tokens": data.train.n_target_tokens,
            "counts": asdict(data.train_encoded.counts),
            "chat_template": data.template_origin,
            "now": data.now.isoformat(),
            "fingerprint": data.train.fingerprint(),
            "held_out_fingerprint": data.validation.fingerprint() if data.validation else None,
        },
        "lora": None if job.lora is None else asdict(job.lora),
        "train": asdict(job.train),
        "data_config": asdict(job.data_config),
        "run": asdict(job.run),
    }


def _named(source: Source | None) -> str | None:
    if source is None:
        return None
    return str(source) if isinstance(source, Path | str) else "rows given in Python"
