"""Fine-tune a model on examples: the whole job, from files to an adapter.

from lora.finetune import FinetuneJob, finetune
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora.finetune.job import FinetuneJob, FinetuneResult
    from lora.finetune.run import finetune

_HOMES = {
    "FinetuneJob": "lora.finetune.job",
    "FinetuneResult": "lora.finetune.job",
    "finetune": "lora.finetune.run",
}

__all__ = ["FinetuneJob", "FinetuneResult", "finetune"]


def __getattr__(name: str) -> Any:
    # Resolved on first use: the job's settings are read without torch, by `--help` for one.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
