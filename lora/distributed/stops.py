"""What a process asks of all of them: to stop after a step. Its flags are summed with gradients.

So all processes learn of a signal or a callback's wish from the same step, and end in the same one,
without a collective of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora.runs.interrupts import SIGNALS

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
