"""Fine-tune a model on examples: the whole job, from files to an adapter.

    done = lora.finetune("orders.jsonl", rank=16, steps=300)    # settings by their names
    done = lora.finetune(FinetuneJob(data="orders.jsonl", lora=LoRAConfig(rank=16)))

The package is callable (see lora/public/packages.py); its names are imported as usual:

    from lora.finetune import FinetuneJob, finetune
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lora.public.packages import CallablePackage, load_name

if TYPE_CHECKING:
    from lora.finetune.from_settings import finetune
    from lora.finetune.job import FinetuneJob, FinetuneResult

_HOMES = {
    "FinetuneJob": "lora.finetune.job",
    "FinetuneResult": "lora.finetune.job",
    "finetune": "lora.finetune.from_settings",
}

__all__ = ["FinetuneJob", "FinetuneResult", "finetune"]


def __getattr__(name: str) -> Any:
    # Resolved on first use: the job's settings are read without torch, by `--help` for one.
    return load_name(__name__, name, _HOMES)


sys.modules[__name__].__class__ = CallablePackage  # lora.finetune(...), as well as a package
