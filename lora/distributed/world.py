"""The processes of one run as each of them sees it: its rank, and what they do together.

Collectives are PyTorch's own. Every process calls them in the same order; each call says what it
waits for, so that a run which stands still can say where. A process that runs alone calls the same
methods, which then do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from lora.device import Share
from lora.errors import LoraError
from lora.runs.interrupts import SIGNALS

ValueT = TypeVar("ValueT")
N_FLAGS = len(SIGNALS) + 1
"""One for each signal, and one for callbacks."""


@dataclass
class StopFlags:
    """What one process asks, or what all of them have agreed on."""

    signal: int = 0
    """The number of the signal that was received; 0: none."""
    callback: bool = False
    """Whether a callback ends the run."""

    def numbers(self) -> list[float]:
        """Return the flags as numbers that can be summed over processes, (N_FLAGS,)."""
        return [float(self.signal == number) for number in SIGNALS] + [float(self.callback)]

    def clear(self) -> None:
        """Ask nothing."""
        self.signal, self.callback = 0, False

    @classmethod
    def from_sums(cls, sums: Sequence[float]) -> StopFlags:
        """Return what the summed numbers say: what at least one process asks."""
        signals = (number for number, asked in zip(SIGNALS, sums, strict=False) if asked)
        return cls(next(signals, 0), bool(sums[-1]))


@dataclass(frozen=True)
class World:
    """One process among N; made by `lora.distributed.start.joined`."""

    rank: int = 0
    """Of this process, from 0; rank 0 writes files and shows progress."""
    size: int = 1
    """Processes, N."""
    local_rank: int = 0
    """Of this process on its machine: the number of its GPU."""
    local_size: int = 1
    """Processes on this machine."""
    host_group: dist.ProcessGroup | None = None
    """Gloo's, for objects and tensors in host memory; None alone."""
    device_group: dist.ProcessGroup | None = None
    """NCCL's where the processes have GPUs, else gloo's; None alone."""
    waits: Callable[[str], AbstractContextManager[object]] = nullcontext
    """Called with what is waited for; the context of a collective."""
    asked: StopFlags = field(default_factory=StopFlags, compare=False)
    """What this process asks of all of them: the sum of the next step carries it."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    @property
    def share(self) -> Share:
        """This process's part of a batch."""
        return Share(self.rank, self.size)

    def sum(self, tensor: Tensor, what: str) -> None:
        """Changes `tensor` in place: the sum of all processes' tensors, the same bits in each.

        `what` is waited for, in words ("the gradients of step 3"). On a GPU it is queued: the host
        does not wait.
        """
        if not self.is_alone:
            with self.waits(what):
                dist.all_reduce(tensor, group=self._group_of(tensor))

    def broadcast(self, tensor: Tensor, what: str, source: int = 0) -> None:
        """Changes `tensor` in place: it becomes that of rank 0, or of rank `source`."""
        if not self.is_alone:
            with self.waits(what):
                dist.broadcast(tensor, source, group=self._group_of(tensor))

    def gather(self, value: Any, what: str) -> list[Any]:
        """Return what every process gave, by rank. Values are pickled: small ones only."""
        if self.is_alone:
            return [value]
        values = [None] * self.size
        with self.waits(what):
            dist.all_gather_object(values, value, group=self.host_group)
        return values

    def from_main(self, value: Any, what: str) -> Any:
        """Return the value that rank 0 gave."""
        if self.is_alone:
            return value
        values = [value]
        with self.waits(what):
            dist.broadcast_object_list(values, 0, group=self.host_group)
        return values[0]

    def on_main(self, function: Callable[[], ValueT], what: str) -> ValueT:
        """Return what `function` returns on rank 0, which alone calls it: a small value.

        An error that lora raises on purpose is raised on every rank.
        """
        if self.is_alone:
            return function()
        value: Any = None
        failure: LoraError | None = None
        if self.is_main:
            try:
                value = function()
            except LoraError as error:
                self.from_main((None, error), what)
                raise
        value, failure = self.from_main((value, failure), what)
        if failure is not None:
            raise failure
        done: ValueT = value
        return done

    def on_all(self, function: Callable[[], ValueT], what: str) -> ValueT:
        """Return what `function`, which waits for no other process, returns in this one.

        An error that lora raises on purpose in one process is raised on every rank: the others
        would wait for that process in vain.
        """
        if self.is_alone:
            return function()
        value: Any = None
        failure: LoraError | None = None
        try:
            value = function()
        except LoraError as error:
            failure = error
        for each in self.gather(failure, what):
            if each is not None:
                raise each
        done: ValueT = value
        return done

    def any(self, value: bool, what: str) -> bool:
        """Return whether any process gave True."""
        return any(self.gather(value, what))

    def _group_of(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self.device_group if tensor.is_cuda else self.host_group


ALONE = World()
"""A process without others."""
