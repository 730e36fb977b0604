"""The device of each process, and the least batch that so many processes can share."""

from __future__ import annotations

import torch

from lora.config import TrainConfig
from lora.distributed.ranks import this_rank, world_size
from lora.distributed.world import World
from lora.errors import ConfigError


def own_device(requested: str) -> str:
    """Return the device of this process: `requested`, or its own GPU if it is one of several.

    Raises ConfigError for the numbered GPU of another process, and where this machine has fewer
    GPUs than processes.
    """
    if world_size() == 1:
        return requested
    here = this_rank()
    own = f"cuda:{here.local_rank}"
    if requested in ("cpu", own):
        return requested
    if requested.startswith("cuda:"):
        raise ConfigError(
            f"Cannot use device={requested!r} with {world_size()} processes: each takes the GPU of "
            "its own number on its machine. Use device=auto, and CUDA_VISIBLE_DEVICES to choose "
            "which GPUs there are."
        )
    n_gpus = torch.cuda.device_count()
    if requested not in ("auto", "cuda") or not n_gpus:
        return "cpu" if requested == "auto" else requested
    if here.local_size > n_gpus:
        raise ConfigError(
            f"Cannot use {here.local_size} processes on this machine: PyTorch sees {n_gpus} "
            f"{'GPU' if n_gpus == 1 else 'GPUs'}, and each process needs one. Start {n_gpus}, or "
            "use device=cpu."
        )
    return own


def check_own_device(device: torch.device) -> None:
    """Raise ConfigError for a model on another GPU than that of this process."""
    if world_size() == 1 or device.type != "cuda":
        return
    own = this_rank().local_rank
    if (device.index or 0) != own:
        raise ConfigError(
            f"Cannot train a model on {device} in the process with LOCAL_RANK={own}: each process "
            "trains on the GPU of its own number. Move the model: "
            "model.to(f\"cuda:{os.environ['LOCAL_RANK']}\")."
        )


def check_batch(train: TrainConfig, world: World) -> None:
    """Raise ConfigError for micro-batches with fewer sequences than there are processes."""
    size, n = train.micro_batch_size, world.size
    if size >= n:
        return
    fitting = [
        passes
        for passes in range(1, train.gradient_accumulation)
        if train.batch_size % passes == 0 and train.batch_size // passes >= n
    ]
    way = f"gradient_accumulation={fitting[-1]}" if fitting else f"batch_size={n} or more"
    raise ConfigError(
        f"Cannot train with {n} processes: a micro-batch has {size} "
        f"{'sequence' if size == 1 else 'sequences'} (batch_size={train.batch_size}, "
        f"gradient_accumulation={train.gradient_accumulation}), and each process takes at least "
        f"one. Allowed: at most {size} processes. Use {way}."
    )
