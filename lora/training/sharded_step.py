"""The plain step of a model whose every weight is sharded and trains: full fine-tuning with FSDP2.

The backward pass leaves each process the summed gradients of its own rows. AdamW updates these rows
alone, and the norm for clipping is summed over the processes with the loss: one small all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora.config import TrainConfig
from lora.data.sequences.batches import Batch, needs_mask
from lora.device import DeviceChoice
from lora.distributed.shards import ShardReader, let_go_tables, local_part, scatter_rows
from lora.distributed.tensors import broadcast_tensors
from lora.distributed.world import StopFlags, World
from lora.training.checkpoint import (
    OPTIMIZER_KEYS,
    check_parameters,
    random_states,
    read_trained_tensors,
    restore_random_states,
)
from lora.training.optim import adamw, parameter_groups, scale_and_clip
from lora.training.plain_step import (
    AutogradStepRunner,
    StepResult,
    backward_sums,
    check_finite,
)
from lora.training.step_runner import LossFn, TrainingState


class ShardedStepRunner(AutogradStepRunner):
    """Takes steps of full fine-tuning on a model that `lora.distributed.fsdp` has sharded.

    A `lora.training.step_runner.StepRunner`.

    Args:
        model: sharded; all of it trains.
        loss_fn: (model, batch) -> (loss sum, target tokens), both (1,).
        choice: where it runs, and the compute dtype.
        config: of AdamW and clipping.
        world: the processes, each with its part of every micro-batch and of every weight.
        on_first: called with the tokens of the first micro-batch, before it is run.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        choice: DeviceChoice,
        config: TrainConfig,
        world: World,
        on_first: Callable[[int], None] | None = None,
    ) -> None:
        # Plain parameters over the same memory as the shards: what AdamW does to each of them is
        # one kernel, without a distributed tensor's bookkeeping.
        named = dict(model.named_parameters())
        self._own = {name: nn.Parameter(local_part(p).detach()) for name, p in named.items()}
        of_whole = {id(parameter): self._own[name] for name, parameter in named.items()}
        groups = parameter_groups(model, config.weight_decay)
        for group in groups:
            group["params"] = [of_whole[id(parameter)] for parameter in group["params"]]
        super().__init__(model, loss_fn, choice, config, adamw(groups, 0.0), world)
        self.batch_device = torch.device("cpu")  # `launch` looks at a batch before it goes on
        self._on_first = on_first

    def launch(
        self, step: int, micro_batches: Sequence[Batch], learning_rates: Sequence[float]
    ) -> None:
        """Take step number `step`."""
        on_device = [_on_device(batch, self._choice.device) for batch in micro_batches]
        if self._on_first is not None:
            self._on_first(on_device[0].input_ids.numel())
            self._on_first = None
        super().launch(step, on_device, learning_rates)

    def _take_step(self, step: int, micro_batches: Sequence[Batch]) -> StepResult:
        model, world, what = self._model, self._world, f"the loss of step {step}"
        model.zero_grad(set_to_none=True)
        loss_sum, n_tokens = backward_sums(
            model, micro_batches, self._loss_fn, self._choice.autocast
        )
        gradients = []
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self._own[name].grad = local_part(parameter.grad)
                gradients.append(local_part(parameter.grad))
        squares = torch.nn.utils.get_total_norm(gradients).double().square()
        sums = torch.cat(
            (
                loss_sum.double(),
                n_tokens.double(),  # in fp64: counts are exact
                squares.reshape(1),
                loss_sum.new_tensor(world.asked.numbers(), dtype=torch.float64),
            )
        )
        world.sum(sums, what)
        loss_sum, n_tokens = sums[:1].to(loss_sum.dtype), sums[1:2].to(n_tokens.dtype)
        loss, norm = loss_sum / n_tokens.clamp(min=1), sums[2].sqrt().to(loss_sum.dtype)
        norm = scale_and_clip(gradients, n_tokens, self._max_grad_norm, norm=norm)
        model.zero_grad(set_to_none=True)
        with world.waits(what):  # on a GPU the host waits here, not where the sum was queued
            stops = StopFlags.from_sums(sums[3:].tolist())
        check_finite(loss, norm, self.optimizer, stops)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, n_tokens, norm, stops)

    def evaluate(self, batches: Iterable[Any]) -> list[float]:
        """Return the mean loss in nats over all target tokens of `batches`, dropout off."""
        losses = super().evaluate(batches)
        let_go_tables(self._model)
        return losses

    def state(self, adapter: int = 0) -> TrainingState:
        """Return what trains, AdamW's moments and the states of random generators.

        Rank 0 reads the tensors whole, as one process would have them, within
        `lora.distributed.shards.on_main_with`.
        """
        own: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        n_rows: dict[str, int] = {}
        for name, whole in self._model.named_parameters():
            own[f"model.{name}"] = self._own[name].detach()
            for key, value in self.optimizer.state.get(self._own[name], {}).items():
                kept = counts if value.dim() == 0 else own
                kept[f"optimizer.{key}.{name}"] = value
            n_rows |= {key: len(whole) for key in own if key not in n_rows}
        reader = ShardReader(own, n_rows, self._world)
        shards = {name: reader.whole(name) for name in own}
        # A checkpoint's writer takes tensors in parts too.
        return cast(TrainingState, {**shards, **counts, **random_states(self._choice.device)})

    def restore(self, state: TrainingState, *, step: int, adapter: int = 0) -> None:
        """Changes model, optimizer and generators in place; AdamW's own step number is in `state`.

        `state` is rank 0's; what the others give is not used. Raises CheckpointError in all
        processes if it is of another model.
        """
        world = self._world
        tensors = {name: t for name, t in state.items() if isinstance(t, Tensor)}
        self._load_trained({n[6:]: t for n, t in tensors.items() if n.startswith("model.")})
        small = {n: t for n, t in tensors.items() if t.dim() == 0 or n.startswith("random.")}
        names = world.from_main(list(tensors), "the names in the checkpoint")
        small = broadcast_tensors(small, world, "the newest checkpoint")
        for name, own in self._own.items():
            moments = {}
            for key in OPTIMIZER_KEYS:
                saved = f"optimizer.{key}.{name}"
                if saved in small:
                    moments[key] = small[saved].to(own.device)
                elif saved in names:  # a parameter that never had a gradient has none
                    moments[key] = torch.empty_like(own)
                    self._scatter(name, tensors.get(saved), moments[key])
            if moments:
                self.optimizer.state[own] = moments
        restore_random_states(small, self._choice.device)

    def load_trained(self, path: Path) -> None:
        """Changes the model in place: what trains gets the values of rank 0's checkpoint at `path`.

        Raises CheckpointError in all processes for one that is damaged or of another model.
        """
        saved = {}
        self._world.on_main(lambda: saved.update(read_trained_tensors(path)), "the checkpoint")
        self._load_trained(saved)

    def _load_trained(self, saved: Mapping[str, Tensor]) -> None:
        let_go_tables(self._model)
        named = dict(self._model.named_parameters())
        self._world.on_main(lambda: check_parameters(named, saved), "the checkpoint's names")
        for name, own in self._own.items():
            self._scatter(name, saved.get(name), own)

    def _scatter(self, name: str, whole: Tensor | None, own: Tensor) -> None:
        count = len(self._model.get_parameter(name))
        scatter_rows(whole, own.detach(), count, self._world, f"{name} of the checkpoint")


def _on_device(batch: Batch, device: torch.device) -> Batch:
    """Return `batch` on a GPU, where attention without a mask is several times faster."""
    if device.type == "cpu":
        return batch
    return replace(batch, is_causal=not needs_mask(batch)).to(device)
