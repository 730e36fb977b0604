"""Export for other programs: GGUF files for llama.cpp, merged models, a check for vLLM.

    lora.export("orders.gguf", adapter="runs/orders/adapter", dtype="q8_0")

The package is callable: see lora/public/packages.py.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lora.public.packages import CallablePackage, load_name

if TYPE_CHECKING:
    from lora.export.run import export, merge

_HOMES = {"export": "lora.export.run", "merge": "lora.export.run"}

__all__ = ["export", "merge"]


def __getattr__(name: str) -> Any:
    return load_name(__name__, name, _HOMES)


sys.modules[__name__].__class__ = CallablePackage  # lora.export(...), as well as a package
