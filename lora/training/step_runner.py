"""The protocol between a training loop and what takes its optimizer steps.

A step is launched now and read when it is done, so that it may run on a GPU while the host prepares
the next. The runner owns the optimizer: its state leaves and enters through `state` and `restore`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora.distributed.world import StopFlags

LossFn = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
"""(model, batch) -> (loss sum in nats, target tokens), both (K,): one for each adapter."""
TrainingState = dict[str, Tensor]
"""All tensors that training changes, by the names that a checkpoint gives them."""


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step came to, on the host.

    Lists have one entry for each adapter that trains: one, unless several are stacked.
    """

    step: int
    """From 1."""
    losses: list[float]
    """Mean over the step's target tokens, in nats."""
    n_tokens: int
    """Target tokens, of all adapters together."""
    gradient_norms: list[float]
    """Of the mean gradient, before clipping."""
    learning_rates: list[float]
    not_finite: dict[int, str] = field(default_factory=dict)
    """By adapter: why its update was not made, because loss or gradient are not finite."""
    bad_sequences: tuple[tuple[int, int], ...] | None = None
    """Where that began: (micro-batch, index of the sequence in it), from 0; () if it can be any of
    them; None where the batch has nothing to do with it."""
    stops: StopFlags = field(default_factory=StopFlags)
    """What several processes have agreed on in this step."""


class StepRunner(Protocol):
    """Takes optimizer steps on one model, and returns their outcomes afterwards.

    Trains one set of parameters, or K stacked adapters; where there is one, `adapter` is 0.
    """

    @property
    def batch_device(self) -> torch.device:
        """Where `launch` takes micro-batches: the CPU if the runner copies them on by itself."""

    def launch(
        self, step: int, micro_batches: Sequence[Any], learning_rates: Sequence[float]
    ) -> None:
        """Begin step number `step` (from 1), at one learning rate for each adapter."""

    def finished(self, *, wait: bool) -> list[StepOutcome]:
        """Return steps that are done and were not returned before; with `wait`, all launched."""

    def evaluate(self, batches: Iterable[Any]) -> list[float]:
        """Return each adapter's mean loss in nats over all target tokens of `batches`.

        Dropout is off. Batches are on the model's device, and every adapter sees each of them.
        """

    def state(self, adapter: int = 0) -> TrainingState:
        """Return what trains, the optimizer's moments and the states of random generators.

        May be views, valid until the next step.
        """

    def restore(self, state: TrainingState, *, step: int, adapter: int = 0) -> None:
        """Changes the model, the optimizer and random generators in place: training continues after
        `step` steps as it did where `state` was taken.

        Raises CheckpointError if `state` is of another model.
        """
