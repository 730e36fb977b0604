"""The captured step of any causal model: autograd's forward and backward in one CUDA graph.

For models that the hand-written step cannot train: transformers' models, and our own decoders of
other families. What differs from the textbook: the host launches no kernel within a step; what
trains lies in one flat buffer, so that AdamW is one kernel; blocks go through torch.compile while
the graph is captured and are left as they were. The model's own code is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.data.sequences.batches import IGNORE, Batch, find_bounds, needs_mask
from lora.decoder.language_model import LanguageModel
from lora.decoder.quantised.nf4 import Nf4Linear
from lora.device import DeviceChoice
from lora.distributed.dropout import SharedDropouts
from lora.distributed.world import ALONE, World
from lora.fast.bounds import DocumentBounds, pinned
from lora.fast.chunked_loss import ChunkedLoss
from lora.fast.graphs import Graphs
from lora.fast.weights.flat import FlatParameters
from lora.fast.weights.update import N_TOTALS, FlatUpdate
from lora.kernels.step.ops import Ops
from lora.layers.trainable_tokens import TrainableTokensLinear
from lora.layers.wide import keep_outputs_narrow
from lora.training.checkpoint import OptimizerState
from lora.training.losses import transform_of
from lora.training.optim import parameter_groups

MEMORY_BUDGET = 0.99
"""Of what torch.compile would keep for a block's backward pass. Below 1 it keeps no output of an
elementwise operation that it can compute again: 14 instead of 20 values for each of a Llama's
hidden states."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""(what the forward returns, labels (B, T)) -> summed loss ()."""


class Forward(Protocol):
    """How a captured step gets the loss's input of a batch, reading no value on the host."""

    def takes_bounds(self, packed: bool) -> bool:
        """Whether a batch is computed by where its documents begin, without a mask."""

    def context(
        self, packed: bool, bounds: Tensor, max_tokens: int
    ) -> AbstractContextManager[None]:
        """Return what a forward of such a batch runs in; documents have ≤ `max_tokens`."""

    def __call__(self, batch: Batch, packed: bool) -> Tensor:
        """Return hidden states (B, T, C) or logits; `packed`: order alone keeps no tokens apart."""


class PlainForward:
    """A forward that is one function of the batch: one of our decoders', or any other model's."""

    def __init__(self, run: Callable[[Batch, bool], Tensor]) -> None:
        self.run = run

    def takes_bounds(self, packed: bool) -> bool:
        """Packed documents go through a mask."""
        return False

    def context(
        self, packed: bool, bounds: Tensor, max_tokens: int
    ) -> AbstractContextManager[None]:
        """Nothing is changed."""
        return nullcontext()

    def __call__(self, batch: Batch, packed: bool) -> Tensor:
        """Return what the function returns."""
        return self.run(batch, packed)


class CapturedStep:
    """Trains `model` on batches of one shape: autograd, captured, and one AdamW kernel.

    Args:
        model: any causal model; what trains in it becomes views of one buffer.
        forward: runs the model.
        loss: of what `forward` returns.
        ops: has the AdamW kernel.
        choice: the device, and the compute dtype.
        weight_decay: of matrices.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them alone.
        compiled: blocks of the model that go through torch.compile.
        world: processes that have parts of each micro-batch.
        dropouts: the model's, whose masks the processes draw together; None: each draws its own.
        whole_rate_fraction: of the learning rate, for what trains beside LoRA.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        ops: Ops,
        choice: DeviceChoice,
        *,
        loss: Loss,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        compiled: nn.ModuleList | None = None,
        world: World = ALONE,
        dropouts: SharedDropouts | None = None,
        whole_rate_fraction: float = 1.0,
    ) -> None:
        self.model, self.forward, self.choice = model, forward, choice
        self.compiled, self.loss = compiled, loss
        self.device = choice.device
        n_totals = 0 if world.is_alone else N_TOTALS
        self.flat = flatten_trained(model, self.device, n_totals, whole_rate_fraction)
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
        self.batch: Batch | None = None
        self.bounds = DocumentBounds(self.device, 0)

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
            return self._run(("step",), packed, partial(self._whole, packed), draw)
        first = index == 0
        run = partial(self._micro, packed, first=first)
        return self._run(("micro", first), packed, run, draw)

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
            target.copy_(pinned(source, self.device), non_blocking=True)
        packed = needs_mask(batch)
        # Asked of the batch on the host: asking the device would make the host wait for it.
        if self.forward.takes_bounds(packed) and self.bounds.copy_in(
            find_bounds(batch.document_ids)
        ):
            self.graphs.clear()
        return packed

    def _run(
        self, kind: tuple[Any, ...], packed: bool, function: Callable[[], None], draw: int
    ) -> bool:
        assert self.batch is not None
        key = (*kind, packed)
        # A replay runs no Python: what changes the model's modules is needed for captures only,
        # and outside of them the model is the user's own, for evaluations and saving.
        with ExitStack() as entered:
            if not self.graphs.has(key):
                longest = self.batch.input_ids.shape[1]
                context = self.forward.context(packed, self.bounds.tensor, longest)
                entered.enter_context(context)
                if self._dropouts is not None:
                    entered.enter_context(self._dropouts.drawn_together(draw))
                if self.compiled is not None:
                    entered.enter_context(compiled_blocks(self.compiled))
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
            loss_sum = self.loss(self.forward(fixed, packed), fixed.labels)
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
def flatten_trained(
    model: nn.Module, device: torch.device, n_totals: int = 0, whole_rate_fraction: float = 1.0
) -> FlatParameters:
    """Changes what trains in `model` in place: fp32 views of one flat buffer, values kept.

    Slots are in the order of `trained(model)`; `n_totals` as in FlatParameters.
    """
    parameters = trained(model)
    wide = torch.float64 if all(p.dtype == torch.float64 for p in parameters) else torch.float32
    narrow = keep_outputs_narrow(model)
    if isinstance(model, LanguageModel):
        model.cache_dtype = narrow or model.cache_dtype
    # Values in fp32 whatever the model's dtype: AdamW's small steps are lost in bf16.
    # Any decay above 0 tells matrices from norms, biases and embeddings; the value is the update's.
    groups = parameter_groups(model, 1.0, whole_rate_fraction)
    group_of = {id(p): group for group in groups for p in group["params"]}
    flat, slots = FlatParameters(device, wide, n_totals), []
    for parameter in parameters:
        group = group_of[id(parameter)]
        decays, fraction = group["weight_decay"] > 0, group["learning_rate_share"]
        slots.append(flat.reserve(tuple(parameter.shape), decays=decays, lr_fraction=fraction))
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


def loss_of_head(model: LanguageModel, ops: Ops, *, compiles: bool = False) -> Loss:
    """Return the loss of the hidden states of `model`: all logits at once only where they must be.

    They are for a fully trained head, whose gradient is one matmul then, and for LoRA on it.
    """
    head = model.output_head()
    is_known = type(head) in (nn.Linear, Nf4Linear)
    is_frozen = is_known and not any(p.requires_grad for p in head.parameters())
    has_rows = isinstance(head, TrainableTokensLinear)
    if (is_frozen or has_rows) and not model.needs_all_logits:
        return ChunkedLoss(head, ops.token_loss, transform_of(model.config))
    # In one kernel the logits of a large vocabulary are read and written fewer times.
    summed = torch.compile(summed_loss, dynamic=False) if compiles else summed_loss
    return lambda hidden, labels: summed(model.logits_of(hidden), labels)


def decoder_forward(model: LanguageModel) -> PlainForward:
    """Return the forward of one of our decoders; packed documents go through a mask."""

    def run(batch: Batch, packed: bool) -> Tensor:
        return model.hidden_states(
            batch.input_ids,
            position_ids=batch.position_ids,
            document_ids=batch.document_ids if packed else None,
        )

    return PlainForward(run)


@contextmanager
def compiled_blocks(blocks: nn.ModuleList) -> Iterator[None]:
    """Inside the context the `blocks` of a model go through torch.compile; then they are as before.

    Blocks of one type share one compilation. What elementwise operations make (norms' outputs,
    activations) is computed again in the backward pass, in the kernels that read their inputs there
    anyway, and not kept until then.
    """
    from torch._functorch import config as functorch_config  # torch.compile loads it anyway

    plain = list(blocks)
    for index, block in enumerate(plain):
        # Not the whole model: one block compiles in a fraction of the time and is used for all.
        blocks[index] = torch.compile(block, dynamic=False)  # type: ignore[assignment]
    try:
        # The second: matmuls over packed weights are operations of ours, which the compiler would
        # take for free to compute again.
        with functorch_config.patch(
            activation_memory_budget=MEMORY_BUDGET, is_non_builtin_to_include=True
        ):
            yield
    finally:
        for index, block in enumerate(plain):
            blocks[index] = block
