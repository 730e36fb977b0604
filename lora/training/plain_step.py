"""The plain step: autograd, clipping and AdamW, and the mean loss of an evaluation.

Both reach the model through `loss_fn(model, batch) -> (loss sum, target tokens)`, both (1,);
nothing here knows what a batch is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora.config import TrainConfig
from lora.device import DeviceChoice, synchronize
from lora.distributed.dropout import SharedDropouts
from lora.distributed.tensors import sum_gradients
from lora.distributed.world import ALONE, StopFlags, World
from lora.errors import TrainingError
from lora.training.checkpoint import restore_training_tensors, training_tensors
from lora.training.diagnosis import Finding, find_in_all
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
    stops: StopFlags = field(default_factory=StopFlags)
    """What several processes have agreed on."""


class StepNotFiniteError(TrainingError):
    """A step was not taken; `stops` is what several processes have agreed on in it."""

    def __init__(self, message: str, stops: StopFlags) -> None:
        super().__init__(message)
        self.stops = stops


def train_step(
    model: nn.Module,
    micro_batches: Sequence[Any],
    loss_fn: LossFn,
    optimizer: torch.optim.Optimizer,
    *,
    max_grad_norm: float = 1.0,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    world: World = ALONE,
    what: str = "the gradients of a step",
) -> StepResult:
    """Changes `model` and `optimizer` in place: one step on the mean loss of all micro-batches.

    The loss is the mean over the target tokens of the whole step, however it is split into
    micro-batches and over the processes of `world`, which wait for `what`. Raises
    StepNotFiniteError before anything is changed if the loss or the gradient is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    loss_sum, n_tokens = backward_sums(model, micro_batches, loss_fn, autocast)
    stops = StopFlags()
    if not world.is_alone:
        loss_sum, n_tokens, stops = _sum_over(world, loss_sum, n_tokens, optimizer, what)
    loss = loss_sum / n_tokens.clamp(min=1)  # (1,)
    gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    norm = scale_and_clip(gradients, n_tokens, max_grad_norm)
    check_finite(loss, norm, optimizer, stops)
    optimizer.step()
    return StepResult(loss=loss, n_tokens=n_tokens, gradient_norm=norm, stops=stops)


def backward_sums(
    model: nn.Module,
    micro_batches: Sequence[Any],
    loss_fn: LossFn,
    autocast: Callable[[], AbstractContextManager[object]],
) -> tuple[Tensor, Tensor]:
    """Add the gradients of all micro-batches to those of `model`.

    Returns the sum of their losses and the number of their target tokens, both (1,).
    """
    losses, counts = [], []
    for batch in micro_batches:
        with autocast():
            loss_sum, n_tokens = loss_fn(model, batch)  # (1,), (1,)
        loss_sum.sum().backward()
        losses.append(loss_sum.detach())
        counts.append(n_tokens)
    return torch.stack(losses).sum(0), torch.stack(counts).sum(0)


def check_finite(
    loss: Tensor, norm: Tensor, optimizer: torch.optim.Optimizer, stops: StopFlags
) -> None:
    """Raise StepNotFiniteError, without gradients left, if loss or gradient are not finite."""
    # The host waits for the device here: nothing may move before the check.
    if not torch.isfinite(norm + loss.sum()):
        optimizer.zero_grad(set_to_none=True)
        losses_shown = ", ".join(map(str, loss.tolist()))
        raise StepNotFiniteError(
            f"The loss is {losses_shown} and the gradient norm {norm.item()}: not finite, so "
            "the step was not taken. Lower the learning rate, or look for damaged examples.",
            stops,
        )


def _sum_over(
    world: World, loss_sum: Tensor, n_tokens: Tensor, optimizer: torch.optim.Optimizer, what: str
) -> tuple[Tensor, Tensor, StopFlags]:
    """Changes gradients in place: sums over processes; return loss, tokens and flags of all."""
    flags = loss_sum.new_tensor(world.asked.numbers(), dtype=torch.float64)
    totals = torch.cat((loss_sum.double(), n_tokens.double(), flags))  # in fp64: counts are exact
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    sums = sum_gradients(parameters, totals, world, what)
    stops = StopFlags.from_sums(sums[2:].tolist())
    return sums[:1].to(loss_sum.dtype), sums[1:2].to(n_tokens.dtype), stops


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    world: World = ALONE,
    what: str = "an evaluation",
) -> float:
    """Return the mean loss in nats over all target tokens of `batches`, dropout off.

    Several processes have as many batches each, dealt in turn; all get the same bits.
    """
    was_training = model.training
    model.eval()
    own = []
    for batch in batches:
        with autocast():
            loss_sum, n_tokens = loss_fn(model, batch)
        own.append((loss_sum.double().sum().item(), int(n_tokens.sum().item())))
    model.train(was_training)
    total, count = 0.0, 0
    for of_all in zip(*world.gather(own, what), strict=True):  # in the order of the batches
        for loss, n in of_all:
            total += loss
            count += n
    return total / count if count else math.nan


class AutogradStepRunner(ABC):
    """Takes steps through autograd; a step is done when it is launched.

    Args:
        model: on the device; what trains has `requires_grad`.
        loss_fn: (model, batch) -> (loss sum, target tokens), both (1,).
        choice: where it runs, and the compute dtype.
        config: of clipping and the micro-batches' size.
        optimizer: of what trains.
        world: processes that have parts of each micro-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        choice: DeviceChoice,
        config: TrainConfig,
        optimizer: torch.optim.Optimizer,
        world: World,
    ) -> None:
        self.batch_device = choice.device
        self.optimizer = optimizer
        self._model, self._loss_fn, self._choice = model, loss_fn, choice
        self._max_grad_norm = config.max_grad_norm
        self._world, self._micro_batch_size = world, config.micro_batch_size
        self._outcomes: list[StepOutcome] = []

    @abstractmethod
    def _take_step(self, step: int, micro_batches: Sequence[Any]) -> StepResult:
        """Changes model and optimizer in place. All processes raise StepNotFiniteError, or none."""

    def launch(
        self, step: int, micro_batches: Sequence[Any], learning_rates: Sequence[float]
    ) -> None:
        """Take step number `step`."""
        (learning_rate,) = learning_rates
        set_learning_rate(self.optimizer, learning_rate)
        try:
            result = self._take_step(step, micro_batches)
        except StepNotFiniteError as error:
            found = find_in_all(
                self._model,
                micro_batches,
                self._loss_fn,
                self._choice.autocast,
                self._micro_batch_size,
                self._world,
            )
            why = f"{error} {found.sentence}"
            self._outcomes.append(skipped_step(step, learning_rate, why, found, error.stops))
            return
        synchronize(self._choice.device)  # so that the step's time is its own
        self._outcomes.append(
            StepOutcome(
                step,
                losses=result.loss.tolist(),
                n_tokens=int(result.n_tokens.sum()),
                gradient_norms=[result.gradient_norm.item()],
                learning_rates=[learning_rate],
                stops=result.stops,
            )
        )

    def finished(self, *, wait: bool) -> list[StepOutcome]:
        """Return the steps taken since the last call."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def evaluate(self, batches: Iterable[Any]) -> list[float]:
        """Return the mean loss in nats over all target tokens of `batches`, dropout off."""
        autocast, world = self._choice.autocast, self._world
        return [evaluate(self._model, batches, self._loss_fn, autocast, world)]


class PlainStepRunner(AutogradStepRunner):
    """Takes steps through `train_step`. A `lora.training.step_runner.StepRunner`.

    Args:
        model: on the device; what trains has `requires_grad`.
        loss_fn: (model, batch) -> (loss sum, target tokens), both (1,).
        choice: where it runs, and the compute dtype.
        config: of AdamW and clipping.
        world: processes that have parts of each micro-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        choice: DeviceChoice,
        config: TrainConfig,
        world: World = ALONE,
    ) -> None:
        optimizer = build_optimizer(model, 0.0, config.weight_decay, config.whole_rate_fraction)
        super().__init__(model, loss_fn, choice, config, optimizer, world)
        size, seed = config.micro_batch_size, config.seed
        self._dropouts = SharedDropouts(model, world.share, size, seed)

    def _take_step(self, step: int, micro_batches: Sequence[Any]) -> StepResult:
        with self._dropouts.drawn_together(step):
            return train_step(
                self._model,
                micro_batches,
                self._loss_fn,
                self.optimizer,
                max_grad_norm=self._max_grad_norm,
                autocast=self._choice.autocast,
                world=self._world,
                what=f"the gradients of step {step}",
            )

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


def skipped_step(
    step: int, learning_rate: float, why: str, found: Finding, stops: StopFlags
) -> StepOutcome:
    """Return the outcome of a step that one model did not take, because of what was `found`."""
    return StepOutcome(
        step,
        losses=[math.nan],
        n_tokens=0,
        gradient_norms=[math.nan],
        learning_rates=[learning_rate],
        not_finite={0: why},
        bad_sequences=found.sequences if found.is_of_data else None,
        stops=stops,
    )
