"""Weights that are split over processes by rows, and where their values come from."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lora.distributed.world import World

Rows = Callable[[str, slice], Tensor]
"""(a parameter's full name, rows along its first dimension) -> those rows, on the CPU.

In any floating-point dtype; the tensor is the caller's own.
"""

ALL_ROWS = slice(None)


def gather_shards(whole: Tensor, own: Tensor, world: World, what: str) -> None:
    """Changes `whole` (N · n,) in place: every process's `own` (n,), in order of rank.

    Both are contiguous. `what` is waited for, in words; on a GPU the host does not wait.
    """
    if world.is_alone:
        whole.copy_(own)
        return
    try:
        from torch.distributed import all_gather_single as gather
    except ImportError:  # its name before torch 2.13
        from torch.distributed import all_gather_into_tensor as gather
    with world.waits(what):
        gather(whole, own, group=world.device_group)
