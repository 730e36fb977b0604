"""The captured step of any causal model: autograd's forward and backward in one CUDA graph.

For models that the hand-written step cannot train: transformers' models, and our own decoders of
other families. What differs from the textbook: the host launches no kernel within a step; what
trains lies in one flat buffer, so that AdamW is one kernel; blocks go through torch.compile while
the graph is captured and are left as they were. The model's own code is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.data.sequences.batches import IGNORE, Batch, needs_mask
from lora.device import DeviceChoice
from lora.distributed.dropout import SharedDropouts
from lora.distributed.world import ALONE, World
from lora.fast.graphs import Graphs
from lora.fast.transformers_models import unmasked_attention
from lora.fast.weights.flat import FlatParameters, Slot
from lora.fast.weights.update import N_TOTALS, FlatUpdate
from lora.kernels.step.ops import Ops
from lora.training.checkpoint import OptimizerState
from lora.training.optim import parameter_groups

Forward = Callable[[nn.Module, Batch, bool], Tensor]
"""(model, batch, needs a mask) -> logits (B, T, V), without reading a value on the host."""


class CapturedStep:
    """Trains `model` on batches of one shape: autograd, captured, and one AdamW kernel.

    Args:
        model: any causal model that `forward` can call; what trains becomes views of one buffer.
        forward: returns the model's logits.
        ops: has the AdamW kernel.
        choice: the device, and the compute dtype.
        weight_decay: of matrices.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them alone.
        compiles: send the repeated blocks and the loss through torch.compile.
        unmasked: one of transformers' models that needs no masks of its own.
        world: processes that have parts of each micro-batch.
        dropouts: the model's, whose masks the processes draw together; None: each draws its own.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        ops: Ops,
        choice: DeviceChoice,
        *,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        compiles: bool = False,
        unmasked: bool = False,
        world: World = ALONE,
        dropouts: SharedDropouts | None = None,
    ) -> None:
        self.model, self.forward, self.choice = model, forward, choice
        self.compiles, self.unmasked = compiles, unmasked
        self.device = choice.device
        self.flat = flatten_trained(model, self.device, 0 if world.is_alone else N_TOTALS)
        self.update = FlatUpdate(
            self.flat,
            ops.adamw,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            world=world,
        )
        self._is_shared, self._dropouts = not world.is_alone, dropouts
        self.report = self.update.report
        self.graphs = Graphs(self.device, self.update.is_live)
        # In one kernel the logits of a large vocabulary are read and written fewer times.
        self.loss = torch.compile(summed_loss, dynamic=False) if compiles else summed_loss
        self.batch: Batch | None = None

    def launch(self, batches: Sequence[Batch], learning_rate: float, number: int = 1) -> None:
        """Train a step on the micro-batches; its outcome is in `report` when it is done.

        All batches of a run have one shape (B, T). On a GPU this returns before the step is done.
        """
        # Into a tensor: a graph replays the values of Python's numbers at its capture.
        self.update.set_learning_rate(learning_rate)
        may_repeat = len(batches) > 1 and self.device.type == "cuda"
        drawn = torch.cuda.get_rng_state(self.device) if may_repeat else None

        def rewind() -> None:
            if drawn is not None:
                torch.cuda.set_rng_state(drawn, self.device)  # dropout draws the same masks again

        self.graphs.accumulate(
            len(batches), lambda index: self._run_pass(batches, index, number), rewind
        )
        if len(batches) > 1 or self._is_shared:
            self.update.sum_over_processes(f"the gradients of step {number}")
            self.graphs.run(("update",), self._update)

    def _run_pass(self, batches: Sequence[Batch], index: int, number: int) -> bool:
        """Run one micro-batch of step `number`; return whether it was rehearsed."""
        packed = self._copy_in(batches[index])
        draw = number * len(batches) + index  # another one for each micro-batch of the run
        if len(batches) == 1 and not self._is_shared:
            # With one micro-batch the update is in the same graph: one launch a step.
            return self._run(("step", packed), partial(self._whole, packed), draw)
        first = index == 0
        return self._run(("micro", first, packed), partial(self._micro, packed, first=first), draw)

    def optimizer_state(self) -> OptimizerState:
        """Return AdamW's state by parameter name, views of the flat moments."""
        return self.update.optimizer_state(self.model)

    def load_optimizer_state(self, saved: OptimizerState) -> None:
        """Changes AdamW's state in place, after the model's parameters were restored."""
        self.update.load_optimizer_state(self.model, saved)

    def _copy_in(self, batch: Batch) -> bool:
        """Copy `batch` to where the graphs read it; return whether its documents need a mask."""
        if self.batch is None or self.batch.input_ids.shape != batch.input_ids.shape:
            # Graphs hold the addresses of the tensors that are replaced here.
            self.graphs.clear()
            fields = batch.input_ids, batch.labels, batch.position_ids, batch.document_ids
            # Copied even on a CPU, where `to` alone would write the next batch over the caller's.
            self.batch = Batch(*(x.to(self.device, copy=True) for x in fields))
        fixed = self.batch
        for target, source in (
            (fixed.input_ids, batch.input_ids),
            (fixed.labels, batch.labels),
            (fixed.position_ids, batch.position_ids),
            (fixed.document_ids, batch.document_ids),
        ):
            # From pageable memory the copy would make the host wait.
            staged = source.pin_memory() if self.device.type == "cuda" else source
            target.copy_(staged, non_blocking=True)
        return needs_mask(batch)

    def _run(self, key: tuple[Any, ...], function: Callable[[], None], draw: int) -> bool:
        # A replay runs no Python: what changes the model's modules is needed for captures only,
        # and outside of them the model is the user's own, for evaluations and saving.
        with ExitStack() as entered:
            if not self.graphs.has(key):
                if self.unmasked:
                    entered.enter_context(unmasked_attention(self.model))
                if self._dropouts is not None:
                    entered.enter_context(self._dropouts.drawn_together(draw))
                if self.compiles:
                    entered.enter_context(compiled_blocks(self.model))
            return self.graphs.run(key, function)

    def _whole(self, packed: bool) -> None:
        self._micro(packed, first=True)
        self._update()

    def _micro(self, packed: bool, *, first: bool) -> None:
        assert self.batch is not None
        fixed = self.batch
        if first:
            self.flat.gradients.zero_()
        for slot, parameter in zip(self.flat.slots, trained(self.model), strict=True):
            # Autograd adds to a gradient that is there in place, and so into the flat buffer. Set
            # each time, because whoever calls zero_grad in between sets it to None.
            parameter.grad = slot.gradients
        with self.choice.autocast():
            logits = self.forward(self.model, fixed, packed)  # (B, T, V)
            loss_sum = self.loss(logits, fixed.labels)
        loss_sum.backward()
        n_learned = (fixed.labels != IGNORE).sum()
        self.update.count(loss_sum.detach(), n_learned, first=first)

    @torch.no_grad()
    def _update(self) -> None:
        self.update.run()


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Return what trains, each tensor once."""
    return [p for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def flatten_trained(model: nn.Module, device: torch.device, n_totals: int = 0) -> FlatParameters:
    """Changes what trains in `model` in place: fp32 views of one flat buffer, values kept.

    Slots are in the order of `trained(model)`; `n_totals` as in FlatParameters.
    """
    parameters = trained(model)
    wide = torch.float64 if all(p.dtype == torch.float64 for p in parameters) else torch.float32
    # Values in fp32 whatever the model's dtype: AdamW's small steps are lost in bf16.
    # Any decay above 0 tells matrices from norms, biases and embeddings; the value is the update's.
    decaying = {
        id(p) for group in parameter_groups(model, 1.0) if group["weight_decay"] > 0
        for p in group["params"]
    }  # fmt: skip
    flat = FlatParameters(device, wide, n_totals)
    slots: list[Slot] = [flat.reserve(tuple(p.shape), decays=id(p) in decaying) for p in parameters]
    flat.allocate()
    for slot, parameter in zip(slots, parameters, strict=True):
        slot.values.copy_(parameter)
        parameter.data = slot.values
    return flat


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy () of logits (B, T, V), summed over the learned `labels` (B, T)."""
    wide = logits.flatten(0, 1)  # (B·T, V)
    wide = wide.to(torch.promote_types(wide.dtype, torch.float32))
    return F.cross_entropy(wide, labels.flatten(), ignore_index=IGNORE, reduction="sum")


def decoder_logits(model: nn.Module, batch: Batch, packed: bool) -> Tensor:
    """Return the logits (B, T, V) of one of our decoders; packed documents through a mask."""
    documents = batch.document_ids if packed else None
    logits: Tensor = model(batch.input_ids, position_ids=batch.position_ids, document_ids=documents)
    return logits


@contextmanager
def compiled_blocks(model: nn.Module) -> Iterator[None]:
    """Inside the context the blocks of `model` go through torch.compile; then they are as before.

    Blocks are the modules of its longest ModuleList of one type. They share one compilation.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    alike = [m for m in lists if len({type(block) for block in m}) == 1]
    blocks = max(alike, key=len, default=nn.ModuleList())
    plain = list(blocks)
    for index, block in enumerate(plain):
        # Not the whole model: one block compiles in a fraction of the time and is used for all.
        blocks[index] = torch.compile(block, dynamic=False)  # type: ignore[assignment]
    try:
        yield
    finally:
        for index, block in enumerate(plain):
            blocks[index] = block
