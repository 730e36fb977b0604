"""When memory runs out: what took it, and which setting to change. No torch is loaded here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora.errors import TrainingError

if TYPE_CHECKING:
    from torch import nn

_WORDS = (
    "out of memory",  # of CUDA, and of its caching allocator
    "can't allocate memory",  # of torch on a CPU
    "not enough memory",
    "bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_LARGE_SHARE = 0.25
LOADING_ADVICE = (
    "The weights alone do not fit: close other programs that use this memory, or take a smaller "
    "model or a device with more of it."
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on a GPU or on the host."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


@dataclass(frozen=True)
class Held:
    """Bytes that a run holds from step to step, counted from the model."""

    frozen_bytes: int
    trained_bytes: int
    state_bytes: int
    """Gradients, and AdamW's two moments, of what trains."""

    @property
    def total_bytes(self) -> int:
        """All of them; the rest of what a process takes are activations and buffers."""
        return self.frozen_bytes + self.trained_bytes + self.state_bytes


def count_held(model: nn.Module) -> Held:
    """Return what training `model` holds whatever the batch is."""
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return Held(frozen, trained, 3 * trained)


@contextmanager
def explained(explain: Callable[[], str]) -> Iterator[None]:
    """While entered, memory that runs out becomes a TrainingError with `explain`'s words."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        first = (str(error).strip() or "MemoryError").splitlines()[0]
        asked = first[first.find("DefaultCPUAllocator") :] if "DefaultCPU" in first else first
        raise TrainingError(f"Memory ran out {explain()} (torch: {asked[:200]})") from error


def say_held(held: Held, peak_bytes: int, rows: int) -> str:
    """Return what took the memory, in gigabytes, of `rows` rows at once."""
    rest_bytes = max(0, peak_bytes - held.total_bytes)
    return (
        f"Held were {_gb(held.frozen_bytes)} of frozen weights, {_gb(held.trained_bytes)} of "
        f"weights that train and {_gb(held.state_bytes)} of their gradients and moments; of the "
        f"{_gb(peak_bytes)} at the peak the other {_gb(rest_bytes)} are activations of {rows} "
        f"{'row' if rows == 1 else 'rows'} at once, and buffers."
    )


def advise(held: Held, *, batch_size: int, micro_batches: int, has_lora: bool) -> str:
    """Return which settings to change, the one that costs nothing first."""
    ways = []
    more = [n for n in range(micro_batches + 1, batch_size + 1) if batch_size % n == 0]
    if more:
        ways.append(
            f"--micro-batches {more[0]} instead of {micro_batches} (the result stays the same, "
            f"{batch_size // more[0]} rows at once)"
        )
    ways.append("a shorter --max-length")
    if held.trained_bytes + held.state_bytes > _LARGE_SHARE * held.total_bytes:
        ways.append("a smaller --rank or fewer --targets" if has_lora else "LoRA instead of --full")
    ways.append("a smaller model or a device with more memory")
    return f"Try, in this order: {'; '.join(ways)}. `lora plan` shows which batch fits."


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"
