"""Comparison of LoRA with full fine-tuning and PEFT: same base, same data, same evaluation.

from lora.compare import CompareConfig, compare
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora.compare.config import CompareConfig
    from lora.compare.run import CompareResult, compare

_HOMES = {
    "CompareConfig": "lora.compare.config",
    "CompareResult": "lora.compare.run",
    "compare": "lora.compare.run",
}

__all__ = ["CompareConfig", "CompareResult", "compare"]


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line reads the settings, without torch, for its help.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
