"""Training K stacked adapters at once: each with its own rate, clipping, data and fate.

What differs from the textbook: what trains lies in one buffer (K, n), a row an adapter, so that the
norm, the clipping, the check and AdamW's step of all adapters are a few operations over rows.
An adapter whose loss or gradient is not finite is stopped with its reason; its gradient is masked
to zero and its rate is 0 from then on, and the bits of the others do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora.config import TrainConfig
from lora.kernels.step.adamw import AdamWSettings
from lora.stacked.apply import StackedAdapters
from lora.training.optim import rate_factor

CPU = torch.device("cpu")
LossFn = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
State = dict[str, Tensor]


class StackedStepRunner(Protocol):
    """Steps of K adapters at once, launched now and read when they are done."""

    batch_device: torch.device
    """Where batches are wanted."""
    failures: dict[int, str]
    """Why adapter k was stopped, by k."""

    def launch(self, micro_batches: Sequence[Any]) -> None:
        """Begin a step."""

    def finished(self, *, wait: bool) -> list[list[float]]:
        """Return each adapter's mean loss, (K,), of the steps that are done and were not returned.

        With `wait`, of all that were launched. An adapter that failed in one is in `failures` then.
        """

    def drop(self, k: int, reason: str) -> None:
        """Stop adapter `k` for `reason`."""

    def state(self, k: int) -> State:
        """Return copies of all that adapter `k` needs to go on."""

    def restore(self, k: int, state: State, step: int) -> None:
        """Changes adapter `k` in place: it goes on from `state` after `step` steps."""


class StackedAdamW:
    """AdamW over what trains of K stacked adapters, with a rate and a decay for each.

    Changes the layers: their parameters become views of its buffer. As in
    `lora.training.optim.parameter_groups`, A and B decay, and embeddings take their share of the
    rate.
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
        """Move the parameters' gradients into `grads`, which replaces what was there."""
        for p, part in zip(self._parameters, self._grad_parts, strict=True):
            if p.grad is None:
                part.zero_()
            else:
                part.copy_(p.grad.flatten(1))
            p.grad = None

    @torch.no_grad()
    def step(self, numbers: Sequence[int], rates: Sequence[float]) -> None:
        """Take each adapter's own step number (from 1); one at rate 0 stays where it is."""
        settings = AdamWSettings()
        self.mean.lerp_(self.grads, 1 - settings.beta1)
        self.square.mul_(settings.beta2).addcmul_(self.grads, self.grads, value=1 - settings.beta2)
        root = self._column([(1 - settings.beta2**number) ** 0.5 for number in numbers])
        update = self.mean / self.square.sqrt().div_(root).add_(settings.eps)  # (K, n)
        rate = self._column(rates)  # (K, 1)
        risen = self._column([1 - settings.beta1**number for number in numbers])  # (K, 1)
        of_lora, whole = slice(0, self._n_lora), slice(self._n_lora, None)
        self.values[:, of_lora].mul_(1 - rate * self._decays)
        update[:, of_lora].mul_(rate / risen)
        update[:, whole].mul_(rate * self._shares / risen)
        self.values.sub_(update)

    def moments(self, k: int) -> dict[str, Tensor]:
        """Return views of adapter `k`'s moments by tensor (`mean.NAME`), without padding."""
        return {
            f"{kind}.{name}": part
            for kind, buffer in (("mean", self.mean), ("square", self.square))
            for name, part in self._own(buffer, k)
        }

    def _own(self, buffer: Tensor, k: int) -> Iterator[tuple[str, Tensor]]:
        """Yield adapter `k`'s part of `buffer` (K, n) for each tensor that trains, unpadded."""
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
    """Steps of K adapters on one model, each as `lora.training.plain_step.train_step` takes it.

    Args:
        model: with `stacked` on it.
        loss_fn: (model, batch) -> (loss sums, target tokens), both (K,).
        configs: one for each adapter, with its learning rate.
        autocast: the context of a forward.
        device: where batches are wanted.
    """

    def __init__(
        self,
        model: nn.Module,
        stacked: StackedAdapters,
        loss_fn: LossFn,
        configs: Sequence[TrainConfig],
        rates: Sequence[float],
        *,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        device: torch.device = CPU,
    ) -> None:
        self.batch_device = device
        self._done: list[list[float]] = []
        self._model, self._loss_fn, self._autocast = model, loss_fn, autocast
        self._configs, self._rates = tuple(configs), tuple(rates)
        self.optimizer = StackedAdamW(stacked, configs)
        self.stacked = stacked
        self.steps = [0] * stacked.stack.n_adapters
        """Taken so far, by adapter."""
        self.failures: dict[int, str] = {}
        """Why adapter k was stopped, by k."""

    def step(self, micro_batches: Iterable[Any]) -> list[float]:
        """Changes the adapters in place: one step; return each one's mean loss in nats, (K,)."""
        optimizer = self.optimizer
        losses, counts = [], []
        for batch in micro_batches:
            with self._autocast():
                loss_sum, n_tokens = self._loss_fn(self._model, batch)  # (K,), (K,)
            loss_sum.sum().backward()
            losses.append(loss_sum.detach())
            counts.append(n_tokens)
        count = torch.stack(counts).sum(0).clamp(min=1)  # (K,)
        loss = torch.stack(losses).sum(0) / count  # (K,)
        optimizer.take_grads()
        norm = optimizer.grads.norm(dim=1) / count  # (K,)
        self._note_failures(loss, norm)
        self._scale_and_clip(count, norm)
        rates = scheduled_rates(self._rates, self._configs, self.steps)
        rates = [0.0 if k in self.failures else rate for k, rate in enumerate(rates)]
        self.steps = [step + 1 for step in self.steps]
        optimizer.step(self.steps, rates)
        return [float(value) for value in loss]

    def launch(self, micro_batches: Iterable[Any]) -> None:
        """Take a step: this one is done at once."""
        self._done.append(self.step(micro_batches))

    def finished(self, *, wait: bool) -> list[list[float]]:
        """Return each adapter's mean loss, (K,), of the steps that were not returned before."""
        done, self._done = self._done, []
        return done

    def drop(self, k: int, reason: str) -> None:
        """Stop adapter `k` for `reason`: it stays where it is from now on."""
        self.failures[k] = reason

    def state(self, k: int) -> State:
        """Return copies of all that adapter `k` needs to go on, in this stack or another.

        Its values (`value.NAME`), moments (`mean.NAME`, `square.NAME`) and the state of its
        dropout's generator (`dropout`); the number of its step is in `steps`.
        """
        values = {f"value.{name}": tensor for name, tensor in self.stacked.values(k).items()}
        moments = {name: tensor.clone() for name, tensor in self.optimizer.moments(k).items()}
        return {**values, **moments, "dropout": self.stacked.stack.generators[k].get_state()}

    @torch.no_grad()
    def restore(self, k: int, state: State, step: int) -> None:
        """Changes adapter `k` in place: it goes on from `state` after `step` steps."""
        named = {name.removeprefix("value."): tensor for name, tensor in state.items()}
        self.stacked.fill(k, named)
        for name, part in self.optimizer.moments(k).items():
            part.copy_(state[name])
        self.stacked.stack.generators[k].set_state(state["dropout"].cpu())
        self.steps[k] = step

    def _note_failures(self, loss: Tensor, norm: Tensor) -> None:
        # The host waits for the device here: nothing may move before the check.
        for k, (value, length) in enumerate(zip(loss.tolist(), norm.tolist(), strict=True)):
            if k not in self.failures and not torch.isfinite(torch.tensor(value + length)):
                self.failures[k] = why_stopped(self.steps[k] + 1, value, length)

    def _scale_and_clip(self, count: Tensor, norm: Tensor) -> None:
        longest = norm.new_tensor([c.max_grad_norm or torch.inf for c in self._configs])
        factor = (longest / (norm + 1e-6)).clamp(max=1.0) / count  # (K,)
        grads = self.optimizer.grads
        grads.mul_(factor[:, None].to(grads.dtype))
        if self.failures:  # masked: a NaN times zero would stay NaN
            grads[sorted(self.failures)] = 0


def scheduled_rates(
    peaks: Sequence[float], configs: Sequence[TrainConfig], steps: Sequence[int]
) -> list[float]:
    """Return each adapter's rate after so many steps of its own."""
    each = zip(peaks, configs, steps, strict=True)
    return [peak * rate_factor(step, config) for peak, config, step in each]


def why_stopped(step: int, loss: float, norm: float) -> str:
    """Return why an adapter is stopped whose loss or gradient is not finite at `step` (from 1)."""
    return (
        f"step {step}: the loss is {loss} and the gradient's norm {norm}, not finite. Lower the "
        "learning rate, or look for damaged examples."
    )


def stacked_loss_sums(logits: Tensor, targets: Tensor, n_adapters: int) -> tuple[Tensor, Tensor]:
    """Return each adapter's summed loss in nats and target tokens, (K,), (K,).

    `logits` is (K·B, T, V); `targets` (K·B, T) int64, −100 where nothing is learned.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)  # (K·B·T, V)
    losses = torch.nn.functional.cross_entropy(wide, targets.flatten(), reduction="none")
    learned = (targets != -100).view(n_adapters, -1).sum(1)  # (K,)
    return losses.view(n_adapters, -1).sum(1), learned
