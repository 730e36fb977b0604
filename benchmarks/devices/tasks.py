"""What each process of a case runs: a probe of the devices, a peer, or our own step."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from devices.cases import SWEEP, Case
from lora.distributed.world import World

PROBE_BYTES = 2**28


def run_task(case: Case, world: World, smoke: bool) -> dict[str, Any]:
    """Return what this rank measured of `case`."""
    if case.variant == "probe":
        return probe(world, smoke=smoke)
    if not case.variant.startswith("ours"):
        from devices.peers import time_peer

        return time_peer(case, world, smoke)
    if case.shape == SWEEP:
        from devices.sweep import time_sweep

        return time_sweep(case, world, smoke)
    from devices.ours import time_ours

    return time_ours(case, world, smoke)


def probe(world: World, *, smoke: bool) -> dict[str, Any]:
    """Return the rate of an all-reduce, an all-gather and a GEMM: does anything work at all?"""
    device = torch.device("cpu" if smoke else "cuda")
    count = 2**10 if smoke else PROBE_BYTES // 2
    whole = torch.ones(count, dtype=torch.bfloat16, device=device)
    found: dict[str, Any] = {}
    if not world.is_alone:
        part = whole[: count // world.size].clone()
        share = (world.size - 1) / world.size
        group = world.device_group
        seconds = _timed(lambda: dist.all_reduce(whole, group=group), device)
        found["all_reduce_gb_s"] = round(2 * 2 * count * share / seconds / 1e9, 1)
        into = whole[: len(part) * world.size]
        seconds = _timed(lambda: dist.all_gather_into_tensor(into, part, group=group), device)
        found["all_gather_gb_s"] = round(2 * count * share / seconds / 1e9, 1)
    size = 64 if smoke else 8192
    x, y = torch.randn(2, size, size, device=device, dtype=torch.bfloat16).unbind()
    seconds = _timed(lambda: x @ y, device)
    return {**found, "gemm_tflops": round(2 * size**3 / seconds / 1e12, 1)}


def _timed(function: Any, device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        function()
    wait()
    begun_s = time.perf_counter()
    for _ in range(10):
        function()
    wait()
    return (time.perf_counter() - begun_s) / 10


def profile_task(case: Case, world: World, smoke: bool) -> dict[str, Any]:
    """Return the kernels of one step of `case` on this rank; our own step only."""
    if not case.variant.startswith("ours") or case.shape == SWEEP:
        return probe(world, smoke=smoke)
    from devices.ours import profile_ours

    return profile_ours(case, world, smoke)
