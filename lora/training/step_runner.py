"""How the loop takes optimizer steps: launched now, read when they are done.

The loop knows no more than this, so that a step may run on a GPU while the host prepares the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step came to, on the host."""

    number: int
    """Of the step, from 1."""
    losses: list[float]
    """Mean over the step's target tokens, in nats, one for each adapter that trains."""
    n_tokens: int
    """Target tokens."""
    gradient_norm: float
    """Of the mean gradient, before clipping."""
    rate: float
    not_finite: str = ""
    """Why the step was not taken: where loss or gradient are not finite; "" if it was taken."""
    places: tuple[tuple[int, int], ...] | None = None
    """Of a step that was not taken: (micro-batch, row in it) where it began, () if that can be any
    of them; None where the batch has nothing to do with it."""


class StepRunner(Protocol):
    """Takes steps, and says afterwards what came of them."""

    def launch(self, number: int, batches: Sequence[Any], rate: float) -> None:
        """Begin step `number` at the rate `rate` on its micro-batches."""

    def finished(self, *, wait: bool) -> list[StepOutcome]:
        """Return steps that are done and were not returned before; with `wait`, all launched.

        A step whose loss or gradient is not finite was not taken and says so (`not_finite`).
        """

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Use `optimizer`'s state, of a resumed run for example, and keep it up to date."""
