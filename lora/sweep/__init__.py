"""Train many candidate settings on one frozen base in one pass and keep the best.

from lora.sweep import SweepJob, sweep
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lora.public.packages import CallablePackage, load_name

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
    return load_name(__name__, name, _HOMES)


sys.modules[__name__].__class__ = CallablePackage  # lora.sweep(...), as well as a package
