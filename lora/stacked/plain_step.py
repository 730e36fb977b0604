"""The plain step of K stacked adapters: autograd, and AdamW with settings for each adapter.

What differs from the textbook: what trains lies in one buffer (K, n), a row an adapter, so that the
norm, the clipping, the check and AdamW's step of all adapters are a few operations over rows.
An adapter whose loss or gradient is not finite is stopped with its reason; its gradient is masked
to zero and its learning rate is 0 from then on, and the bits of the others do not change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora.config import TrainConfig
from lora.device import DeviceChoice
from lora.kernels.step.adamw import AdamWSettings
from lora.stacked.apply import StackedAdapters
from lora.stacked.losses import evaluate_stacked
from lora.training.step_runner import LossFn, StepOutcome, StepRunner, TrainingState


class StackedStepRunner(StepRunner, Protocol):
    """A step runner of K adapters, each of which can be stopped while the others train on."""

    failures: dict[int, str]
    """By adapter: why it no longer trains."""

    def drop(self, adapter: int, reason: str) -> None:
        """Stop `adapter` for `reason`: its values stay what they are from now on."""


class StackedAdamW:
    """AdamW over K stacked adapters, with a learning rate and a weight decay for each.

    Changes the layers: their parameters become views of its buffer. As in
    `lora.training.optim.parameter_groups`, A and B decay, and embeddings take their fraction of the
    learning rate.
    """

    def __init__(self, stacked: StackedAdapters, configs: Sequence[TrainConfig]) -> None:
        lora = [p for la in stacked.layers.values() for p in (la.lora_A, la.lora_B)]
        whole = [embedding.weight for embedding in stacked.embeddings.values()]
        self._stacked = stacked
        self._parameters, self._n_lora = lora + whole, sum(p[0].numel() for p in lora)
        self.values = torch.cat([p.detach().flatten(1) for p in self._parameters], 1)  # (K, n)
        self.grads = torch.zeros_like(self.values)
        self.mean, self.square = torch.zeros_like(self.values), torch.zeros_like(self.values)
        widths = [p[0].numel() for p in self._parameters]
        self._grad_parts = self.grads.split(widths, dim=1)  # each (K, numbers of one tensor)
        for p, part in zip(self._parameters, self.values.split(widths, dim=1), strict=True):
            p.data = part.view(p.shape)
        self._decays = self._column([config.weight_decay for config in configs])
        self._shares = self._column([config.whole_rate_fraction for config in configs])

    @torch.no_grad()
    def take_grads(self) -> None:
        """Move the parameters' gradients into `grads`, replacing those of the step before."""
        for p, part in zip(self._parameters, self._grad_parts, strict=True):
            if p.grad is None:
                part.zero_()
            else:
                part.copy_(p.grad.flatten(1))
            p.grad = None

    @torch.no_grad()
    def step(self, step: int, learning_rates: Sequence[float]) -> None:
        """Take step number `step` (from 1) of all; an adapter at learning rate 0 does not move."""
        settings = AdamWSettings()
        self.mean.lerp_(self.grads, 1 - settings.beta1)
        self.square.mul_(settings.beta2).addcmul_(self.grads, self.grads, value=1 - settings.beta2)
        root = self._column([(1 - settings.beta2**step) ** 0.5] * len(learning_rates))
        update = self.mean / self.square.sqrt().div_(root).add_(settings.eps)  # (K, n)
        rate = self._column(learning_rates)  # (K, 1)
        bias_correction = self._column([1 - settings.beta1**step] * len(learning_rates))  # (K, 1)
        of_lora, whole = slice(0, self._n_lora), slice(self._n_lora, None)
        self.values[:, of_lora].mul_(1 - rate * self._decays)
        update[:, of_lora].mul_(rate / bias_correction)
        update[:, whole].mul_(rate * self._shares / bias_correction)
        self.values.sub_(update)

    def moments(self, k: int) -> dict[str, Tensor]:
        """Return views of adapter `k`'s moments by tensor (`mean.NAME`), without padding."""
        return {
            f"{kind}.{name}": part
            for kind, buffer in (("mean", self.mean), ("square", self.square))
            for name, part in self._own(buffer, k)
        }

    def _own(self, buffer: Tensor, k: int) -> Iterator[tuple[str, Tensor]]:
        """Yield adapter `k`'s part of `buffer` (K, n) for each trained tensor, without padding."""
        widths = [p[0].numel() for p in self._parameters]
        parts = iter(buffer[k].split(widths))
        for name, layer in self._stacked.layers.items():
            rank = layer.ranks[k]
            yield f"{name}.lora_A", next(parts).view(layer.lora_A.shape[1:])[:rank]  # (R_k, I)
            yield f"{name}.lora_B", next(parts).view(layer.lora_B.shape[1:])[:, :rank]  # (O, R_k)
        for name, embedding in self._stacked.embeddings.items():
            yield f"{name}.weight", next(parts).view(embedding.weight.shape[1:])  # (V, C)

    def _column(self, numbers: Sequence[float]) -> Tensor:
        return self.values.new_tensor(list(numbers))[:, None]  # (K, 1)


class PlainStackedRunner:
    """Takes steps of K adapters through autograd, each as `train_step` takes it alone.

    A `StackedStepRunner`; a step is done when it is launched.

    Args:
        model: with `stacked` on it.
        loss_fn: (model, batch) -> (loss sums, target tokens), both (K,).
        configs: of AdamW and clipping, one for each adapter.
        choice: where it runs, and the compute dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        stacked: StackedAdapters,
        loss_fn: LossFn,
        configs: Sequence[TrainConfig],
        choice: DeviceChoice,
    ) -> None:
        self.batch_device = choice.device
        self._outcomes: list[StepOutcome] = []
        self._model, self._loss_fn, self._choice = model, loss_fn, choice
        self._max_grad_norms = [config.max_grad_norm or math.inf for config in configs]
        self.optimizer = StackedAdamW(stacked, configs)
        self.stacked = stacked
        self.failures: dict[int, str] = {}
        """By adapter: why it no longer trains."""

    def launch(
        self, step: int, micro_batches: Sequence[Any], learning_rates: Sequence[float]
    ) -> None:
        """Changes the adapters in place: take step number `step`, the same for all of them."""
        optimizer = self.optimizer
        losses, counts = [], []
        for batch in micro_batches:
            with self._choice.autocast():
                loss_sum, n_tokens = self._loss_fn(self._model, batch)  # (K,), (K,)
            loss_sum.sum().backward()
            losses.append(loss_sum.detach())
            counts.append(n_tokens)
        count = torch.stack(counts).sum(0).clamp(min=1)  # (K,)
        loss = torch.stack(losses).sum(0) / count  # (K,)
        optimizer.take_grads()
        norm = optimizer.grads.norm(dim=1) / count  # (K,)
        # The one wait of the host for the device: nothing may move before the check.
        found = torch.stack((loss.double(), norm.double(), count.double())).tolist()
        not_finite = self._stop_failed(step, found[0], found[1])
        self._scale_and_clip(count, norm)
        rates = [0.0 if k in self.failures else rate for k, rate in enumerate(learning_rates)]
        optimizer.step(step, rates)
        self._outcomes.append(
            StepOutcome(
                step,
                losses=found[0],
                n_tokens=int(sum(found[2])),
                gradient_norms=found[1],
                learning_rates=rates,
                not_finite=not_finite,
            )
        )

    def finished(self, *, wait: bool) -> list[StepOutcome]:
        """Return the steps taken since the last call."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def drop(self, adapter: int, reason: str) -> None:
        """Stop `adapter` for `reason`: its values stay what they are from now on."""
        self.failures[adapter] = reason

    def evaluate(self, batches: Iterable[Any]) -> list[float]:
        """Return each adapter's mean loss in nats over all target tokens of `batches` (B, T)."""
        n = self.stacked.stack.n_adapters
        return evaluate_stacked(self._model, batches, self._loss_fn, n, self._choice)

    def state(self, adapter: int = 0) -> TrainingState:
        """Return copies of all that `adapter` needs to go on, in this stack or another.

        Its values (`value.NAME`), moments (`mean.NAME`, `square.NAME`) and the state of its
        dropout's generator (`dropout`); the number of its step is the caller's to keep.
        """
        own = self.stacked.values(adapter).items()
        values = {f"value.{name}": tensor for name, tensor in own}
        moments = {name: t.clone() for name, t in self.optimizer.moments(adapter).items()}
        generator = self.stacked.stack.generators[adapter]
        return {**values, **moments, "dropout": generator.get_state()}

    @torch.no_grad()
    def restore(self, state: TrainingState, *, step: int, adapter: int = 0) -> None:
        """Changes `adapter` in place: it goes on from `state`."""
        named = {name.removeprefix("value."): tensor for name, tensor in state.items()}
        self.stacked.fill(adapter, named)
        for name, part in self.optimizer.moments(adapter).items():
            part.copy_(state[name])
        self.stacked.stack.generators[adapter].set_state(state["dropout"].cpu())

    def _stop_failed(self, step: int, losses: list[float], norms: list[float]) -> dict[int, str]:
        """Put adapters that are not finite into `failures`; return those that were not there."""
        new = {
            k: why_stopped(step, loss, norm)
            for k, (loss, norm) in enumerate(zip(losses, norms, strict=True))
            if k not in self.failures and not math.isfinite(loss + norm)
        }
        self.failures |= new
        return new

    def _scale_and_clip(self, count: Tensor, norm: Tensor) -> None:
        factor = (norm.new_tensor(self._max_grad_norms) / (norm + 1e-6)).clamp(max=1.0) / count
        grads = self.optimizer.grads
        grads.mul_(factor[:, None].to(grads.dtype))
        if self.failures:  # masked: a NaN times zero would stay NaN
            grads[sorted(self.failures)] = 0


def why_stopped(step: int, loss: float, norm: float) -> str:
    """Return why an adapter is stopped whose loss or gradient is not finite at `step` (from 1)."""
    return (
        f"step {step}: the loss is {loss} and the gradient norm {norm}, not finite. Lower the "
        "learning rate, or look for damaged examples."
    )
