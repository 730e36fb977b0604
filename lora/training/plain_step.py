"""The plain step: autograd, clipping and AdamW, and the mean loss of an evaluation.

Both reach the model through `loss_fn(model, batch) -> (loss sum, target tokens)`, both (1,);
nothing here knows what a batch is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora.config import TrainConfig
from lora.device import DeviceChoice, synchronize
from lora.errors import TrainingError
from lora.training.checkpoint import restore_training_tensors, training_tensors
from lora.training.diagnosis import Finding, find_nonfinite
from lora.training.optim import build_optimizer, scale_and_clip, set_learning_rate
from lora.training.step_runner import LossFn, StepOutcome, TrainingState


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports; tensors stay on the device until they are read."""

    loss: Tensor
    """Mean over the step's target tokens, in nats, (1,)."""
    n_tokens: Tensor
    """Target tokens, (1,)."""
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
            loss_sum, n_tokens = loss_fn(model, batch)  # (1,), (1,)
        loss_sum.sum().backward()
        losses.append(loss_sum.detach())
        counts.append(n_tokens)
    n_tokens = torch.stack(counts).sum(0)  # (1,)
    loss = torch.stack(losses).sum(0) / n_tokens.clamp(min=1)  # (1,)
    gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    norm = scale_and_clip(gradients, n_tokens, max_grad_norm)
    # The host waits for the device here: nothing may move before the check.
    if not torch.isfinite(norm + loss.sum()):
        optimizer.zero_grad(set_to_none=True)
        losses_shown = ", ".join(map(str, loss.tolist()))
        raise TrainingError(
            f"The loss is {losses_shown} and the gradient norm {norm.item()}: not finite, so "
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
    """Takes steps through autograd and `train_step`; a step is done when it is launched.

    A `lora.training.step_runner.StepRunner`.

    Args:
        model: on the device; what trains has `requires_grad`.
        loss_fn: (model, batch) -> (loss sum, target tokens), both (1,).
        choice: where it runs, and the compute dtype.
        config: of AdamW and clipping.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, choice: DeviceChoice, config: TrainConfig
    ) -> None:
        self.batch_device = choice.device
        self.optimizer = build_optimizer(
            model, 0.0, config.weight_decay, config.whole_rate_fraction
        )
        self._model, self._loss_fn, self._choice = model, loss_fn, choice
        self._max_grad_norm = config.max_grad_norm
        self._outcomes: list[StepOutcome] = []

    def launch(
        self, step: int, micro_batches: Sequence[Any], learning_rates: Sequence[float]
    ) -> None:
        """Take step number `step`."""
        (learning_rate,) = learning_rates
        set_learning_rate(self.optimizer, learning_rate)
        model, loss_fn, autocast = self._model, self._loss_fn, self._choice.autocast
        try:
            result = train_step(
                model,
                micro_batches,
                loss_fn,
                self.optimizer,
                max_grad_norm=self._max_grad_norm,
                autocast=autocast,
            )
        except TrainingError as error:
            found = find_nonfinite(model, micro_batches, loss_fn, autocast)
            why = f"{error} {found.sentence}"
            self._outcomes.append(skipped_step(step, learning_rate, why, found))
            return
        synchronize(self._choice.device)  # so that the step's time is its own
        self._outcomes.append(
            StepOutcome(
                step,
                losses=result.loss.tolist(),
                n_tokens=int(result.n_tokens.sum()),
                gradient_norms=[result.gradient_norm.item()],
                learning_rates=[learning_rate],
            )
        )

    def finished(self, *, wait: bool) -> list[StepOutcome]:
        """Return the steps taken since the last call."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def evaluate(self, batches: Iterable[Any]) -> list[float]:
        """Return the mean loss in nats over all target tokens of `batches`, dropout off."""
        return [evaluate(self._model, batches, self._loss_fn, self._choice.autocast)]

    def state(self, adapter: int = 0) -> TrainingState:
        """Return what trains, AdamW's moments and the states of random generators."""
        named = self._model.named_parameters()
        moments = {n: self.optimizer.state[p] for n, p in named if p.requires_grad}
        return training_tensors(self._model, moments)

    def restore(self, state: TrainingState, *, step: int, adapter: int = 0) -> None:
        """Changes model, optimizer and generators in place; AdamW's own step number is in `state`.

        Raises CheckpointError if `state` is of another model.
        """
        moments = restore_training_tensors(self._model, state)
        for name, own in moments.items():
            parameter = self._model.get_parameter(name)
            on_device = {key: tensor.to(parameter.device) for key, tensor in own.items()}
            self.optimizer.state[parameter] = on_device


def skipped_step(step: int, learning_rate: float, why: str, found: Finding) -> StepOutcome:
    """Return the outcome of a step that one model did not take, because of what was `found`."""
    return StepOutcome(
        step,
        losses=[math.nan],
        n_tokens=0,
        gradient_norms=[math.nan],
        learning_rates=[learning_rate],
        not_finite={0: why},
        bad_sequences=found.sequences if found.is_of_data else None,
    )
