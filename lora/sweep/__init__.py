"""Train many candidate settings on one frozen base in one pass and keep the best.

from lora.sweep import SweepJob, sweep
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora.sweep.job import SweepJob
    from lora.sweep.run import SweepResult, sweep

_HOMES = {
    "SweepJob": "lora.sweep.job",
    "SweepResult": "lora.sweep.run",
    "sweep": "lora.sweep.run",
}

__all__ = ["SweepJob", "SweepResult", "sweep"]


def __getattr__(name: str) -> Any:
    # Resolved on first use: the job's settings are read without torch, by `--help` for one.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
