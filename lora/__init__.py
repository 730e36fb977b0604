"""LoRA fine-tuning of language models (arXiv 2106.09685).

    import lora

    done = lora.finetune("orders.jsonl", rank=16, steps=300)
    model, tokenizer = lora.load_model(adapter=done.saved)
    print(lora.generate(model, tokenizer, "Please send 3 lamps to Anna in Rome."))

Public names are loaded on first use, so `import lora` is quick
and brings no torch.

The letters of tensor shapes, here and in every module:

    B batch · T time · C model width · H heads · D head width · F feed-forward width
    V vocabulary · I, O a linear's inputs and outputs · R rank · K adapters trained together
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lora.public.packages import load_name

if TYPE_CHECKING:
    from lora.adapters.apply import apply_lora, disabled_adapter, remove_lora
    from lora.adapters.merge import merge_lora
    from lora.adapters.named.switch import (
        active_adapter,
        adapter_names,
        delete_adapter,
        set_adapter,
    )
    from lora.adapters.save_load import load_adapter, save_adapter
    from lora.compare.run import compare
    from lora.config import (
        DataConfig,
        LoRAConfig,
        MemoryConfig,
        RunConfig,
        SamplingConfig,
        TrainConfig,
    )
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
    from lora.export.run import export, merge
    from lora.finetune.from_settings import finetune
    from lora.finetune.own_model import train
    from lora.inference.api import evaluate, generate, load_model
    from lora.lora_module import (
        LoRALinear,
        ParameterCounts,
        apply_lora_to_linear,
        count_lora_parameters,
    )
    from lora.sweep.run import sweep
    from lora.training.callbacks import Callback, EvalEvent, SaveEvent, StepEvent, StopTraining

__version__ = "0.1.0"

_HOMES = {
    "AdapterError": "lora.errors",
    "Callback": "lora.training.callbacks",
    "CheckpointError": "lora.errors",
    "ConfigError": "lora.errors",
    "DataConfig": "lora.config",
    "DataError": "lora.errors",
    "DependencyError": "lora.errors",
    "EvalEvent": "lora.training.callbacks",
    "LoRAConfig": "lora.config",
    "LoRALinear": "lora.lora_module",
    "LoraError": "lora.errors",
    "MemoryConfig": "lora.config",
    "ModelError": "lora.errors",
    "ParameterCounts": "lora.lora_module",
    "RunConfig": "lora.config",
    "SamplingConfig": "lora.config",
    "SaveEvent": "lora.training.callbacks",
    "StepEvent": "lora.training.callbacks",
    "StopTraining": "lora.training.callbacks",
    "TargetError": "lora.errors",
    "TrainConfig": "lora.config",
    "TrainingError": "lora.errors",
    "active_adapter": "lora.adapters.named.switch",
    "adapter_names": "lora.adapters.named.switch",
    "apply_lora": "lora.adapters.apply",
    "apply_lora_to_linear": "lora.lora_module",
    "compare": "lora.compare.run",
    "count_lora_parameters": "lora.lora_module",
    "delete_adapter": "lora.adapters.named.switch",
    "disabled_adapter": "lora.adapters.apply",
    "evaluate": "lora.inference.api",
    "export": "lora.export.run",
    "finetune": "lora.finetune.from_settings",
    "generate": "lora.inference.api",
    "load_adapter": "lora.adapters.save_load",
    "load_model": "lora.inference.api",
    "merge": "lora.export.run",
    "merge_lora": "lora.adapters.merge",
    "remove_lora": "lora.adapters.apply",
    "save_adapter": "lora.adapters.save_load",
    "set_adapter": "lora.adapters.named.switch",
    "sweep": "lora.sweep.run",
    "train": "lora.finetune.own_model",
}
_PACKAGES = ("compare", "export", "finetune", "sweep")
"""Names that are packages too, and callable: see lora/public/packages.py."""

__all__ = [
    "AdapterError",
    "Callback",
    "CheckpointError",
    "ConfigError",
    "DataConfig",
    "DataError",
    "DependencyError",
    "EvalEvent",
    "LoRAConfig",
    "LoRALinear",
    "LoraError",
    "MemoryConfig",
    "ModelError",
    "ParameterCounts",
    "RunConfig",
    "SamplingConfig",
    "SaveEvent",
    "StepEvent",
    "StopTraining",
    "TargetError",
    "TrainConfig",
    "TrainingError",
    "active_adapter",
    "adapter_names",
    "apply_lora",
    "apply_lora_to_linear",
    "compare",
    "count_lora_parameters",
    "delete_adapter",
    "disabled_adapter",
    "evaluate",
    "export",
    "finetune",
    "generate",
    "load_adapter",
    "load_model",
    "merge",
    "merge_lora",
    "remove_lora",
    "save_adapter",
    "set_adapter",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"lora.{name}")
    value = load_name(__name__, name, _HOMES)
    globals()[name] = value  # found at once the next time
    return value


def __dir__() -> list[str]:
    return __all__
