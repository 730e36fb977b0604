"""LoRA beside full fine-tuning, and PEFT, on the same data with the same measurements.

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
    # Resolved on first use: the job's settings are read without torch, by `--help` for one.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
