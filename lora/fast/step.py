"""The fast training step: forward, backward and AdamW over fixed buffers, captured on a GPU.

What differs from the textbook: the host only copies a batch in and launches; whether the loss is
finite is decided on the device, where a step that is not becomes a step not taken, and is read one
step late.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lora.data.sequences.batches import IGNORE, Batch
from lora.decoder.decoder import Decoder
from lora.decoder.quantised import has_fp8_base
from lora.fast.graphs import Graphs
from lora.fast.llama.buffers import Buffers, Inputs
from lora.fast.llama.checkpointing import ActivationCheckpointing
from lora.fast.llama.network import FastNetwork
from lora.fast.llama.passes import FastPass
from lora.fast.weights.adapted import DropoutMasks
from lora.fast.weights.flat import FlatParameters
from lora.fast.weights.update import FlatUpdate
from lora.kernels.step.ops import Ops
from lora.lora_module import LoRALayer

MERGE_BELOW_WIDTH = 1024
"""Models narrower than this merge W + s·B·A once a step; wider ones keep LoRA in the products."""

CAPTURE_BELOW_TOKENS = 2**15
"""Larger micro-batches take seconds where models are large: rehearsals cost more than launches."""


class OptimizerUpdate(Protocol):
    """How a step ends: loss and tokens counted, what trains brought up to date."""

    report: Tensor
    """What came of the step."""
    is_live: Tensor
    """(), bool: false while a step is only rehearsed, which changes nothing."""

    def set_learning_rate(self, rate: Any) -> None:
        """Take the next step at this rate, or at one for each adapter."""

    def count_tokens(self, losses: Tensor, is_learned: Tensor, *, first: bool) -> None:
        """Add a micro-batch's losses (N,) and which of its tokens are learned (N,)."""

    def run(self) -> None:
        """Bring what trains up to date with its gradients."""


class HandWrittenStep:
    """What the fast steps share: a batch is put in place, forward and backward run, an update ends.

    Args:
        ops: what lies between the products.
        network: what the model's parameters have become views of.
        update: the end of a step.
        keep: what stays of the blocks between forward and backward; None: nearly all.
    """

    def __init__(
        self,
        model: Decoder,
        ops: Ops,
        network: FastNetwork,
        update: OptimizerUpdate,
        checkpointing: ActivationCheckpointing | None = None,
    ) -> None:
        self.model, self.ops, self.network, self.checkpointing = (
            model,
            ops,
            network,
            checkpointing or ActivationCheckpointing(),
        )
        self.device = update.is_live.device
        self.optimizer_update = update
        self.report = update.report
        self.graphs = Graphs(self.device, update.is_live)
        self.buffers: Buffers | None = None
        self.inputs: Inputs | None = None

    @torch.no_grad()
    def launch(self, batches: Sequence[Batch], rate: Any, number: int = 1) -> None:
        """Train step `number` on the micro-batches; `report` says afterwards what came of it.

        All batches of a run have one shape (B, T). On a GPU this returns before the step is done.
        """
        self._make_room(batches[0])
        self.optimizer_update.set_learning_rate(rate)
        for place, batch in enumerate(batches):
            key = self._put(batch)
            self._draw(number, place)
            if len(batches) == 1:
                self.graphs.run(("step", *key), partial(self._whole, key))
            else:
                first = place == 0
                self.graphs.run(("micro", first, *key), partial(self._micro, key, first=first))
        if len(batches) > 1:
            self.graphs.run(("update",), self._update)

    def _draw(self, number: int, place: int) -> None:
        """Get ready what is random in micro-batch `place` of step `number`."""

    def _make_room(self, batch: Batch) -> None:
        rows, tokens = batch.input_ids.shape
        if self.buffers is not None and (self.buffers.rows, self.buffers.tokens) == (rows, tokens):
            return
        self.graphs.clear()
        self.graphs.captures = rows * tokens < CAPTURE_BELOW_TOKENS
        self.buffers = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what lay in pieces is no use to the buffers, nor to a graph
        self.buffers = self.network.buffers(rows, tokens, self.checkpointing)
        ids, labels, positions = torch.zeros(
            3, rows * tokens, dtype=torch.int64, device=self.device
        ).unbind()
        bounds = torch.full((2,), rows * tokens, dtype=torch.int32, device=self.device)
        self.inputs = Inputs(ids, labels, positions, bounds)

    def _put(self, batch: Batch) -> tuple[bool, int]:
        """Copy `batch` to where the step reads it; return whether it is packed, and its room."""
        inputs = cast(Inputs, self.inputs)
        for target, source in (
            (inputs.input_ids, batch.input_ids),
            (inputs.labels, batch.labels),
            (inputs.position_ids, batch.position_ids),
        ):
            target.copy_(_staged(source.reshape(-1), target.device), non_blocking=True)
        tokens = batch.input_ids.shape[1]
        if bool((batch.document_ids == 0).all()) and not self._has_windows(tokens):
            return False, 0
        if self.network.owns_attention(tokens):
            return True, 0
        return True, self._put_bounds(batch.document_ids, inputs)

    def _put_bounds(self, documents: Tensor, inputs: Inputs) -> int:
        """Tell torch's attention where documents begin; return for how many there is room."""
        starts = torch.ones_like(documents, dtype=torch.bool)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        places = starts.reshape(-1).nonzero().squeeze(1).to(torch.int32)  # (documents,)
        if len(inputs.bounds) < len(places) + 1:
            room = max(64, 2 << (len(places) - 1).bit_length())  # a larger batch captures anew
            self.graphs.clear()
            inputs.bounds = inputs.bounds.new_full((room + 1,), documents.numel())
        bounds = torch.full((len(inputs.bounds),), documents.numel(), dtype=torch.int32)
        bounds[: len(places)] = places
        inputs.bounds.copy_(_staged(bounds, inputs.bounds.device), non_blocking=True)
        return len(inputs.bounds)

    def _has_windows(self, tokens: int) -> bool:
        windows = (layer.window_tokens for layer in self.model.config.layers)
        return any(window is not None and window < tokens for window in windows)

    def _whole(self, key: tuple[bool, int]) -> None:
        self._micro(key, first=True)
        self._update()

    def _micro(self, key: tuple[bool, int], *, first: bool) -> None:
        inputs, buffers = cast(Inputs, self.inputs), cast(Buffers, self.buffers)
        step = FastPass(self.network, inputs, buffers, packed=key[0])
        step.run()
        self._learn_head(inputs.labels, buffers, first)
        step.backward(buffers.hidden, first=first)

    def _learn_head(self, labels: Tensor, buffers: Buffers, first: bool) -> None:
        """Changes `buffers.hidden` in place: the gradient of `buffers.final`; sums the loss."""
        head = self.network.head
        weight, chunk = head.tensors[0], len(buffers.logits)
        for start in range(0, buffers.n_tokens, chunk):
            part = slice(start, min(start + chunk, buffers.n_tokens))
            hidden, logits = buffers.final[part], buffers.logits[: part.stop - part.start]
            torch.mm(hidden, weight.T, out=logits)
            self.ops.token_loss(logits, labels[part], buffers.losses[part])
            torch.mm(logits, weight, out=buffers.hidden[part])
            if head.slot is not None:
                gradient, target = logits.T @ hidden, head.slot.gradients[0]
                begins = first and start == 0
                target.copy_(gradient) if begins else target.add_(gradient)
        self.optimizer_update.count_tokens(buffers.losses, labels != IGNORE, first=first)

    def _update(self) -> None:
        self.optimizer_update.run()
        self.network.refresh()


class FastStep(HandWrittenStep):
    """Trains `model` on batches of one shape.

    Args:
        model: a decoder whose LoRA parameters, or all of whose parameters, train; they become views
            of one flat buffer, and frozen weights take `dtype`.
        ops: what lies between the products.
        dtype: of products and activations.
        weight_decay: of matrices.
        seed: of dropout's masks, with the step's number.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them alone.
        merges: add s·B·A to the weights once a step; None decides by the model's width.
        own_attention: of packed rows through our kernels; None decides by the rows' length.
        keep: what stays of the blocks between forward and backward; None: nearly all.
    """

    def __init__(
        self,
        model: Decoder,
        ops: Ops,
        dtype: torch.dtype,
        *,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        seed: int = 0,
        merges: bool | None = None,
        own_attention: bool | None = None,
        checkpointing: ActivationCheckpointing | None = None,
    ) -> None:
        self.seed = seed
        device = next(model.parameters()).device
        wide = torch.promote_types(dtype, torch.float32)
        self.flat = FlatParameters(device, wide)
        self.masks = _find_masks(model, device)
        narrow = model.config.hidden_size < MERGE_BELOW_WIDTH and not has_fp8_base(model)
        self.merges = narrow if merges is None else merges
        with torch.no_grad():
            network = FastNetwork(
                model,
                self.flat,
                ops,
                dtype,
                trains_all=trains_all_weights(model),
                merges=self.merges,
                masks=self.masks,
                own_attention=own_attention,
            )
            self.flat.allocate()
            network.fill()
        self.update = FlatUpdate(
            self.flat, ops.adamw, weight_decay=weight_decay, max_grad_norm=max_grad_norm
        )
        self.taken_steps = self.update.taken_steps
        super().__init__(model, ops, network, self.update, checkpointing)

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """Return AdamW's state by parameter name, views of the step's tensors."""
        return self.update.optimizer_state(self.model)

    @torch.no_grad()
    def load_optimizer_state(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Changes AdamW's state in place, after the model's parameters were restored."""
        self.update.load_optimizer_state(self.model, saved)
        self.network.refresh()  # merged weights are of the parameters before

    def _draw(self, number: int, place: int) -> None:
        if self.masks is not None:
            self.masks.seed.fill_(_mask_seed(self.seed, number, place))


def _find_masks(model: Decoder, device: torch.device) -> DropoutMasks | None:
    layers = [m for m in model.modules() if isinstance(m, LoRALayer)]
    shares = {m.dropout.p for m in layers if isinstance(m.dropout, nn.Dropout)}
    return DropoutMasks(shares.pop(), device) if shares else None


def _staged(source: Tensor, device: torch.device) -> Tensor:
    """Return `source` in memory from which `device` copies by itself."""
    return source.pin_memory() if device.type == "cuda" and not source.is_cuda else source


def _mask_seed(seed: int, step: int, place: int) -> int:
    """Return a number that no other micro-batch of a run has, whatever was resumed before it."""
    return ((seed * 1_000_003 + step) * 1_009 + place) % 2**31


def trains_all_weights(model: nn.Module) -> bool:
    """Whether every parameter of `model` trains."""
    return all(p.requires_grad for p in model.parameters())
