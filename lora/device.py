"""The device and the compute dtype of a run, chosen once, with the reason; memory of a process.

The compute dtype is fp32 without a GPU, or on one without bf16 tensor cores (compute capability
below 8.0: V100, T4). fp16 is never used, because its range requires loss scaling. Apple's GPUs are
refused.

Environment variables: `LORALM_FORCE_BF16=1` allows bf16 where it is slow; `CUDA_VISIBLE_DEVICES` is
PyTorch's own. `CUBLAS_WORKSPACE_CONFIG` is set for bit-for-bit reproducible runs.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lora.errors import ConfigError, did_you_mean

FORCE_BF16 = "LORALM_FORCE_BF16"
CUBLAS_VARIABLE, CUBLAS_REPEATABLE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"


_outside_bytes: dict[int, int] = {}
"""Of GPU tensors that another allocator made, by id, as long as they exist."""


@dataclass(frozen=True)
class DeviceChoice:
    """A device, its compute dtype, and the reason for both."""

    device: torch.device
    compute_dtype: torch.dtype
    """fp32, or bf16 through autocast: parameters and optimizer state stay fp32."""
    reason: str

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context for a forward pass: bf16 autocast, or nothing."""
        if self.compute_dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)


@dataclass(frozen=True)
class Share:
    """The part of process `rank` among `size` processes; alone it is everything."""

    rank: int = 0
    """From 0."""
    size: int = 1
    """Processes, N (torch's world size)."""

    def largest(self, count: int) -> int:
        """Return the most of `count` items that one process takes: all of them hold so many."""
        return -(-count // self.size)

    def part(self, count: int) -> slice:
        """Return which of `count` items this process takes; sizes differ by at most one."""
        each, left = divmod(count, self.size)
        start = self.rank * each + min(self.rank, left)
        return slice(start, start + each + (self.rank < left))


WHOLE = Share()
"""Of a process that is alone."""


def choose_device(requested: str = "auto", precision: str = "auto") -> DeviceChoice:
    """Return the device and the compute dtype to use.

    Raises ConfigError for a device that this machine does not have, an unknown precision, and for
    bf16 on a device where it is slow, unless LORALM_FORCE_BF16=1.
    """
    device = _find_device(requested)
    fast_bf16, why = _bf16(device)
    if precision not in ("auto", "fp32", "bf16"):
        near = did_you_mean(precision, ("auto", "fp32", "bf16"))
        raise ConfigError(f"Cannot use precision={precision!r}. Allowed: auto, fp32, bf16.{near}")
    if precision == "bf16" and not fast_bf16 and os.environ.get(FORCE_BF16) != "1":
        raise ConfigError(
            f"Cannot use precision='bf16' on {device}: {why}. Use precision='fp32' or auto, or "
            f"set {FORCE_BF16}=1 to allow it."
        )
    if precision == "fp32" or (precision == "auto" and not fast_bf16):
        reason = "precision='fp32'" if precision == "fp32" else why
        return DeviceChoice(device, torch.float32, f"{device}, compute dtype fp32: {reason}")
    return DeviceChoice(device, torch.bfloat16, f"{device}, compute dtype bf16: {why}")


def count_outside(tensor: torch.Tensor) -> None:
    """Count `tensor` as memory of this process: PyTorch's allocator does not know of it."""
    key = id(tensor)
    _outside_bytes[key] = tensor.nbytes
    weakref.finalize(tensor, _outside_bytes.pop, key, None)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process: PyTorch's allocator on CUDA, resident on a CPU.

    On CUDA with the tensors of `count_outside` that still exist.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) + sum(_outside_bytes.values())
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux, ru_maxrss of a subprocess starts at its parent's
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Return the resident memory of this process, or its peak where /proc does not exist."""
    status = Path("/proc/self/statm")
    if status.is_file():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return peak_memory_bytes(torch.device("cpu"))


def available_bytes(device_type: str) -> int | None:
    """Return the memory that a run in this process can use, including what it uses already.

    None where it is unknown: without a GPU for "cuda", or on a system without /proc/meminfo.
    """
    if device_type == "cuda":
        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))
    return free + resident_bytes()


def free_bytes(device: torch.device) -> int:
    """Return the memory of a GPU that a large tensor can have: cached blocks are given back first.

    Without a GPU it is what `available_bytes` returns, or no limit.
    """
    if device.type != "cuda":
        known = available_bytes("cpu")
        return sys.maxsize if known is None else known
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def visible_gpus(device: torch.device) -> int:
    """Return how many GPUs a run on `device` could be spread over on this machine; a CPU: none."""
    return torch.cuda.device_count() if device.type == "cuda" else 0


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Within the block PyTorch uses deterministic algorithms only, and raises where it has none.

    Sets CUBLAS_WORKSPACE_CONFIG if it is not set: cuBLAS may else choose another algorithm in each
    call. It stays set after the block, because CUDA reads it when it is first used.
    """
    os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_REPEATABLE)
    former = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(former)


def synchronize(device: torch.device) -> None:
    """Wait until all work queued on the device is done; returns at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _find_device(requested: str) -> torch.device:
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
    except RuntimeError:
        near = did_you_mean(requested, ("auto", "cpu", "cuda"))
        raise ConfigError(
            f"Cannot use device={requested!r}. Allowed: auto, cpu, cuda, cuda:N.{near}"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"Cannot use device={requested!r}: PyTorch sees {torch.cuda.device_count()} CUDA "
            "devices. Use device=cpu, or a PyTorch build with CUDA on a machine with a GPU."
        )
    if device.type == "mps":
        raise ConfigError(
            f"Cannot use device={requested!r}: Apple's GPUs have no fp64, in which losses are "
            "summed and merges are checked, and are untested. Allowed: auto, cpu, cuda, cuda:N. "
            "Use device=cpu."
        )
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"Cannot use device={requested!r}. Allowed: auto, cpu, cuda, cuda:N.")
    return device


def _bf16(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)} (capability {major}.{minor})"
        if major >= 8:
            return True, f"{name} has bf16 tensor cores"
        return False, f"{name} has no bf16 tensor cores, and fp16 would need loss scaling"
    return False, "bf16 on a CPU without bf16 matrix instructions is tens of times slower"
