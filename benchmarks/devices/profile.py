"""One step of a case by kernel: what computes, what communicates, and how much of that shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

Interval = tuple[int, int]
"""Start and end in ns."""
COMMUNICATES = ("nccl", "Memcpy PtoP", "Memcpy DtoD (Peer")
TOP = 12


@dataclass(frozen=True)
class Kernel:
    """One kernel or copy on the device."""

    name: str
    start_ns: int
    end_ns: int

    @property
    def communicates(self) -> bool:
        """Whether it moves data between devices."""
        return self.name.startswith(COMMUNICATES)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the same time as intervals that do not meet, in order."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def length(intervals: Iterable[Interval]) -> int:
    """Return the time of intervals that do not meet, in ns."""
    return sum(end - start for start, end in intervals)


def summarise(kernels: list[Kernel]) -> dict[str, Any]:
    """Return the time of a step's parts in ms, and its kernels that take most.

    exposed_ms is the time in which devices communicate and nothing else runs; idle_ms that in which
    this device does nothing.
    """
    if not kernels:
        return {"kernels": 0}
    every = union((k.start_ns, k.end_ns) for k in kernels)
    moves = union((k.start_ns, k.end_ns) for k in kernels if k.communicates)
    computes = union((k.start_ns, k.end_ns) for k in kernels if not k.communicates)
    exposed = length(every) - length(computes)
    whole = every[-1][1] - every[0][0]
    by_name, launches = Counter[str](), Counter[str]()
    for kernel in kernels:
        by_name[kernel.name[:80]] += kernel.end_ns - kernel.start_ns
        launches[kernel.name[:80]] += 1
    of_parts = {
        "step_ms": whole,
        "compute_ms": length(computes),
        "communication_ms": length(moves),
        "exposed_ms": exposed,
        "idle_ms": whole - length(every),
    }
    top = [[name, round(ns / 1e6, 3), launches[name]] for name, ns in by_name.most_common(TOP)]
    return {**{k: ns / 1e6 for k, ns in of_parts.items()}, "kernels": len(kernels), "top": top}


def kernels_of(profile: torch.profiler.profile) -> list[Kernel]:
    """Return what ran on the device while `profile` watched."""
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    return [
        Kernel(event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in profile.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA and event.duration_ns()
    ]
