"""Comparison of LoRA with full fine-tuning and PEFT: same base, same data, same evaluation.

from lora.compare import CompareConfig, compare
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lora.public.packages import CallablePackage, load_name

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
    return load_name(__name__, name, _HOMES)


sys.modules[__name__].__class__ = CallablePackage  # lora.compare(...), as well as a package
