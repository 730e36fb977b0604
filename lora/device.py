"""Where a run computes and in which number format, decided once, with the reason.

Without a GPU, or on one without bf16 matrix units (before capability 8.0: V100, T4), products are
fp32; fp16 is never computed in, for its range needs a scaled loss. Apple's GPUs are refused.

Reads two environment variables, and nothing else in lora does: `LORALM_FORCE_BF16=1` allows bf16
where it is slow, `CUDA_VISIBLE_DEVICES` is torch's own. Sets one, `CUBLAS_WORKSPACE_CONFIG`, for
runs that repeat to the bit.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lora.errors import ConfigError, did_you_mean

FORCE_BF16 = "LORALM_FORCE_BF16"
CUBLAS_VARIABLE, CUBLAS_REPEATABLE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"


@dataclass(frozen=True)
class DeviceChoice:
    """A device, the type its products are computed in, and why."""

    device: torch.device
    compute_dtype: torch.dtype
    """fp32, or bf16 through autocast: parameters and optimizer state stay fp32."""
    reason: str

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context that a forward pass runs in."""
        if self.compute_dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)


def choose_device(requested: str = "auto", precision: str = "auto") -> DeviceChoice:
    """Return where to compute and how.

    Raises ConfigError for a device that is not there, an unknown precision, and for bf16 on a
    device without fast bf16 products unless LORALM_FORCE_BF16=1.
    """
    device = _find_device(requested)
    fast_bf16, why = _bf16(device)
    if precision not in ("auto", "fp32", "bf16"):
        near = did_you_mean(precision, ("auto", "fp32", "bf16"))
        raise ConfigError(f"precision={precision!r}: allowed are auto, fp32, bf16.{near}")
    if precision == "bf16" and not fast_bf16 and os.environ.get(FORCE_BF16) != "1":
        raise ConfigError(
            f"Cannot compute in bf16 on {device}: {why}. Use precision='fp32' (or auto), "
            f"or set {FORCE_BF16}=1 to use bf16 all the same."
        )
    if precision == "fp32" or (precision == "auto" and not fast_bf16):
        asked = "as asked" if precision == "fp32" else why
        return DeviceChoice(device, torch.float32, f"{device}, fp32: {asked}")
    return DeviceChoice(device, torch.bfloat16, f"{device}, bf16 products, fp32 weights: {why}")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process has held: the allocator's on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: a child's ru_maxrss would begin with its parent's
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Return the memory this process holds now; its peak where the system does not tell."""
    status = Path("/proc/self/statm")
    if status.is_file():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return peak_memory_bytes(torch.device("cpu"))


def available_bytes(device_type: str) -> int | None:
    """Return how much a run of this process may hold, what it holds already included.

    None where it cannot be known: a GPU that is not here, or a system that does not tell.
    """
    if device_type == "cuda":
        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))
    return free + resident_bytes()


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """While entered, torch takes only algorithms that repeat to the bit, and raises where none is.

    Sets CUBLAS_WORKSPACE_CONFIG for the process if it is not set, without which cuBLAS may choose
    otherwise from call to call; that stays, for it counts when CUDA is first used.
    """
    os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_REPEATABLE)
    former = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(former)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; at once on a CPU."""
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
            f"device={requested!r}: allowed are auto, cpu, cuda, cuda:N.{near}"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"Cannot use device={requested!r}: torch sees {torch.cuda.device_count()} CUDA "
            "devices. Use device=cpu, or install a torch with CUDA on a machine that has a GPU."
        )
    if device.type == "mps":
        raise ConfigError(
            f"Cannot use device={requested!r}: Apple's GPUs have no fp64, in which losses are "
            "summed and merges are checked, and nothing here was tested on one. Allowed: "
            "auto, cpu, cuda, cuda:N. Use device=cpu."
        )
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={requested!r}: allowed are auto, cpu, cuda, cuda:N.")
    return device


def _bf16(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)} (capability {major}.{minor})"
        if major >= 8:
            return True, f"{name} has bf16 matrix units"
        return False, f"{name} has no bf16 matrix units, and fp16 would need a scaled loss"
    return False, "bf16 products on a CPU without its matrix units are tens of times slower"
