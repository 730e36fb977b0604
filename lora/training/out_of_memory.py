"""Explains running out of memory: what takes it, and which setting to change. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lora.config import TrainConfig
from lora.errors import LoraError, TrainingError

if TYPE_CHECKING:
    from torch import nn

_WORDS = (
    "out of memory",  # of CUDA, and of its caching allocator
    "can't allocate memory",  # of torch on a CPU
    "not enough memory",
    "bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_LARGE_SHARE, _SMALL_SHARE = 0.25, 0.1
LOADING_ADVICE = (
    "The weights alone do not fit: close other programs that use this memory, or take a smaller "
    "model or a device with more of it."
)
SHARDED_ADVICE = f"{LOADING_ADVICE} Several devices can share them: --devices N --parallel fsdp."
"""Where the weights are whole and may be sharded."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on a GPU or on the host."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, LoraError):  # has been explained: it may quote torch's words
        return False
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


class MemoryParts(Protocol):
    """Bytes at the fullest moment of a step, by part: planned before a run, or counted."""

    @property
    def weights(self) -> int:
        """Of the model."""

    @property
    def gradients(self) -> int:
        """Of trained parameters."""

    @property
    def optimizer(self) -> int:
        """AdamW's moments."""

    @property
    def activations(self) -> int:
        """Saved and temporary ones; they grow with the tokens of a micro-batch."""

    @property
    def loss(self) -> int:
        """Logits and what is computed from them; it grows as activations do."""

    @property
    def other(self) -> int:
        """Of the process."""

    @property
    def leaner_modes(self) -> tuple[tuple[str, int], ...]:
        """Modes of activation checkpointing that would hold less, and how much with each."""

    @property
    def nf4_saving(self) -> int:
        """About what a base in nf4 would save; 0 where it has one, or that is not known."""

    @property
    def devices(self) -> int:
        """Processes that train together; the bytes are of one of them."""

    @property
    def parallel(self) -> str | None:
        """How: ddp or fsdp; None for a process alone."""

    @property
    def total(self) -> int:
        """All of them."""


@dataclass(frozen=True)
class MemoryCount:
    """Memory of a run that has no plan, counted from its model and its peak."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """All that is not counted otherwise."""
    loss: int = 0
    other: int = 0
    leaner_modes: tuple[tuple[str, int], ...] = ()
    nf4_saving: int = 0
    devices: int = 1
    parallel: str | None = None

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations


def count_parts(model: nn.Module, peak_bytes: int) -> MemoryCount:
    """Return what training `model` holds whatever the batch is; the rest are activations."""
    weights = sum(p.nbytes for p in model.parameters())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return MemoryCount(weights, trained, 2 * trained, max(0, peak_bytes - weights - 3 * trained))


@contextmanager
def explain_out_of_memory(explain: Callable[[], str]) -> Iterator[None]:
    """Inside the context, running out of memory becomes a TrainingError with `explain()` in it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        first = (str(error).strip() or "MemoryError").splitlines()[0]
        asked = first[first.find("DefaultCPUAllocator") :] if "DefaultCPU" in first else first
        raise TrainingError(f"Memory ran out {explain()} (torch: {asked[:200]})") from error


def describe_parts(parts: MemoryParts) -> str:
    """Return the sum and its parts in GB (10⁹ bytes), for a line."""
    named = {
        "weights": parts.weights,
        "gradients": parts.gradients,
        "optimizer": parts.optimizer,
        "activations": parts.activations,
        "loss": parts.loss,
        "process": parts.other,
    }
    shown = ", ".join(f"{name} {part / 1e9:.2f}" for name, part in named.items())
    return f"{parts.total / 1e9:.2f} GB ({shown})"


def advise(parts: MemoryParts, config: TrainConfig, *, has_lora: bool, n_gpus: int = 0) -> str:
    """Return what takes most, and which settings to change: first those that cost nothing.

    `n_gpus` are those of the machine that a run could be spread over; 0: it could not.
    """
    size = _sequences(config.micro_batch_size, parts.devices)
    growing, trained = parts.activations + parts.loss, parts.gradients + parts.optimizer
    of_batch = f"activations and loss of {size} {'sequence' if size == 1 else 'sequences'} at once"
    sizes = {
        of_batch: growing,
        "gradients and moments of trained parameters": trained,
        "the weights": parts.weights,
    }
    # None of the first ones changes the result but for its rounding.
    ways = [
        f"--memory {mode} (about {n_bytes / 1e9:.2f} GB)" for mode, n_bytes in parts.leaner_modes
    ]
    ways += _with_devices(parts, config, n_gpus, has_lora=has_lora)
    does_grow = growing > _SMALL_SHARE * parts.total
    if does_grow:
        ways += _splits(parts, config)
    if parts.nf4_saving > _SMALL_SHARE * parts.total:
        less = (parts.total - parts.nf4_saving) / 1e9
        ways.append(f"--base-dtype nf4 (frozen weights rounded to 4 bits, about {less:.2f} GB)")
    if does_grow:
        ways.append("a shorter --max-length")
    if trained > _LARGE_SHARE * parts.total:
        ways.append("a smaller --rank or fewer --targets" if has_lora else "LoRA instead of --full")
    more = ", or more of them with --devices" if parts.devices > 1 or n_gpus == 1 else ""
    ways.append(f"a smaller model or a device with more memory{more}")
    most = max(sizes, key=lambda name: sizes[name])
    return (
        f"Most of it: {most}. Try, in this order: {'; '.join(ways)}. `lora plan` shows which batch "
        "fits."
    )


def _sequences(micro_batch_size: int, devices: int) -> int:
    """Return how many sequences of a micro-batch the device with the most of them takes."""
    return -(-micro_batch_size // devices)


def _with_devices(
    parts: MemoryParts, config: TrainConfig, n_gpus: int, *, has_lora: bool
) -> list[str]:
    """Return what several devices save: of the batch, and of the weights where these are large."""
    flags, devices = "", parts.devices
    ways = []
    if devices == 1 and min(n_gpus, config.batch_size) > 1:
        devices = min(n_gpus, config.batch_size)
        now = config.gradient_accumulation
        # Each device takes at least one sequence of each pass.
        passes = max(
            n
            for n in range(1, now + 1)
            if config.batch_size % n == 0 and config.batch_size // n >= devices
        )
        flags = f"--devices {devices} "
        flags += "" if passes == now else f"--gradient-accumulation {passes} "
        before, share = config.micro_batch_size, _sequences(config.batch_size // passes, devices)
        if share < before:
            less = parts.total - (parts.activations + parts.loss) * (1 - share / before)
            ways.append(
                f"{flags}(the result stays the same, with {share} "
                f"{'sequence' if share == 1 else 'sequences'} at once on each and about "
                f"{less / 1e9:.2f} GB)"
            )
    sharded = parts.weights if has_lora else parts.total - parts.activations - parts.loss
    if devices > 1 and parts.parallel != "fsdp" and sharded > _LARGE_SHARE * parts.total:
        what = "frozen weights" if has_lora else "weights, gradients and moments"
        ways.append(f"{flags}--parallel fsdp (each of {devices} devices has a part of the {what})")
    return ways


def _splits(parts: MemoryParts, config: TrainConfig) -> list[str]:
    """Return the next finer split of the batch and what it would take, or none if there is none."""
    now, devices = config.gradient_accumulation, parts.devices
    before = _sequences(config.micro_batch_size, devices)
    # Each device takes at least one sequence of each pass, and has fewer at once than now.
    finer = (
        n
        for n in range(now + 1, config.batch_size // devices + 1)
        if config.batch_size % n == 0 and _sequences(config.batch_size // n, devices) < before
    )
    next_finer = next(finer, None)
    if next_finer is None:
        return []
    share = _sequences(config.batch_size // next_finer, devices)
    less = parts.total - (parts.activations + parts.loss) * (1 - share / before)
    return [
        f"--gradient-accumulation {next_finer} instead of {now} (the result stays the same, with "
        f"{share} sequences at once and about {less / 1e9:.2f} GB)"
    ]
