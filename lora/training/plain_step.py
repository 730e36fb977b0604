"""One optimizer step through autograd, and the mean loss of an evaluation.

Models meet both through `loss_fn(model, batch) -> (loss sum, target tokens)`, both (K,), with
K = 1 unless several adapters train together. Nothing here knows what a batch is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora.device import DeviceChoice, synchronize
from lora.errors import TrainingError
from lora.training.diagnosis import find_nonfinite
from lora.training.optim import scale_and_clip, set_rate
from lora.training.step_runner import StepOutcome

LossFn = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports; tensors stay on the device until they are read."""

    loss: Tensor
    """Mean over the step's target tokens, in nats, (K,)."""
    n_tokens: Tensor
    """Target tokens, (K,)."""
    gradient_norm: Tensor
    """Of the mean gradient, before clipping, ()."""


def train_step(
    model: nn.Module,
    micro_batches: Sequence[Any],
    loss_fn: LossFn,
    optimizer: torch.optim.Optimizer,
    *,
    max_grad_norm: float = 1.0,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> StepResult:
    """Changes `model` and `optimizer` in place: one step on the mean loss of all micro-batches.

    The loss is the mean over the target tokens of the whole step, however it is split. Raises
    TrainingError before anything is changed if the loss or the gradient is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    losses, counts = [], []
    for batch in micro_batches:
        with autocast():
            loss_sum, n_tokens = loss_fn(model, batch)  # (K,), (K,)
        loss_sum.sum().backward()
        losses.append(loss_sum.detach())
        counts.append(n_tokens)
    n_tokens = torch.stack(counts).sum(0)  # (K,)
    loss = torch.stack(losses).sum(0) / n_tokens.clamp(min=1)  # (K,)
    gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    norm = scale_and_clip(gradients, n_tokens, max_grad_norm)
    # The host waits for the device here: nothing may move before the check.
    if not torch.isfinite(norm + loss.sum()):
        optimizer.zero_grad(set_to_none=True)
        losses_shown = ", ".join(map(str, loss.tolist()))
        raise TrainingError(
            f"The loss is {losses_shown} and the gradient's norm {norm.item()}: not finite, so "
            "the step was not taken. Lower the learning rate, or look for damaged examples."
        )
    optimizer.step()
    return StepResult(loss=loss, n_tokens=n_tokens, gradient_norm=norm)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> float:
    """Return the mean loss in nats over all target tokens of `batches`, dropout off."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        with autocast():
            loss_sum, n_tokens = loss_fn(model, batch)
        total += loss_sum.double().sum().item()
        count += int(n_tokens.sum().item())
    model.train(was_training)
    return total / count if count else math.nan


class PlainStepRunner:
    """Optimizer steps through `train_step`: a step is done when it is launched."""

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, choice: DeviceChoice, max_grad_norm: float
    ) -> None:
        self._model, self._loss_fn, self._choice = model, loss_fn, choice
        self._max_grad_norm = max_grad_norm
        self._done: list[StepOutcome] = []

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Step with `optimizer`."""
        self._optimizer = optimizer

    def launch(self, number: int, batches: Sequence[Any], rate: float) -> None:
        """Take step `number`."""
        set_rate(self._optimizer, rate)
        try:
            result = train_step(
                self._model,
                batches,
                self._loss_fn,
                self._optimizer,
                max_grad_norm=self._max_grad_norm,
                autocast=self._choice.autocast,
            )
        except TrainingError as error:
            where = find_nonfinite(self._model, batches, self._loss_fn, self._choice.autocast)
            why = f"{error} {where.sentence}"
            places = where.places if where.is_of_data else None
            self._done.append(StepOutcome(number, [math.nan], 0, math.nan, rate, why, places))
            return
        synchronize(self._choice.device)
        losses, tokens = result.loss.tolist(), int(result.n_tokens.sum())
        norm = result.gradient_norm.item()
        self._done.append(StepOutcome(number, losses, tokens, norm, rate))

    def finished(self, *, wait: bool) -> list[StepOutcome]:
        """Return the steps taken since the last call."""
        done, self._done = self._done, []
        return done
