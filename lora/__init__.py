"""LoRA fine-tuning of language models (arXiv 2106.09685).

Public names are loaded on first use, so `import lora` is quick and brings no torch.

The letters of tensor shapes, here and in every module:

    B batch · T time · C model width · H heads · D head width · F feed-forward width
    V vocabulary · I, O a linear's inputs and outputs · R rank · K adapters trained together
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora.adapters.apply import apply_lora, disabled_adapter, remove_lora
    from lora.adapters.merge import merge_lora
    from lora.adapters.save_load import load_adapter, save_adapter
    from lora.config import DataConfig, LoRAConfig, MemoryConfig, RunConfig, TrainConfig
    from lora.errors import (
        AdapterError,
        CheckpointError,
        ConfigError,
        DataError,
        DependencyError,
        LoraError,
        ModelError,
        TargetError,
        TrainingError,
    )
    from lora.lora_module import (
        LoRALinear,
        ParameterCounts,
        apply_lora_to_linear,
        count_lora_parameters,
    )

__version__ = "0.1.0"

_HOMES = {
    "AdapterError": "lora.errors",
    "CheckpointError": "lora.errors",
    "ConfigError": "lora.errors",
    "DataConfig": "lora.config",
    "DataError": "lora.errors",
    "DependencyError": "lora.errors",
    "LoRAConfig": "lora.config",
    "LoRALinear": "lora.lora_module",
    "LoraError": "lora.errors",
    "MemoryConfig": "lora.config",
    "ModelError": "lora.errors",
    "ParameterCounts": "lora.lora_module",
    "RunConfig": "lora.config",
    "TargetError": "lora.errors",
    "TrainConfig": "lora.config",
    "TrainingError": "lora.errors",
    "apply_lora": "lora.adapters.apply",
    "apply_lora_to_linear": "lora.lora_module",
    "count_lora_parameters": "lora.lora_module",
    "disabled_adapter": "lora.adapters.apply",
    "load_adapter": "lora.adapters.save_load",
    "merge_lora": "lora.adapters.merge",
    "remove_lora": "lora.adapters.apply",
    "save_adapter": "lora.adapters.save_load",
}

__all__ = [
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "DataConfig",
    "DataError",
    "DependencyError",
    "LoRAConfig",
    "LoRALinear",
    "LoraError",
    "MemoryConfig",
    "ModelError",
    "ParameterCounts",
    "RunConfig",
    "TargetError",
    "TrainConfig",
    "TrainingError",
    "apply_lora",
    "apply_lora_to_linear",
    "count_lora_parameters",
    "disabled_adapter",
    "load_adapter",
    "merge_lora",
    "remove_lora",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lora' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # found at once the next time
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
