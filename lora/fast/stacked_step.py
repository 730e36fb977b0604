"""The hand-written step of K stacked adapters: one forward and backward over the tokens of all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lora.data.sequences.batches import IGNORE, Batch
from lora.decoder.decoder import Decoder
from lora.decoder.quantised.base import base_kind
from lora.fast.hand_written import MERGE_BELOW_WIDTH, HandWrittenStep
from lora.fast.llama.network import FastNetwork
from lora.fast.weights.stacked_flat import StackedFlat
from lora.fast.weights.stacked_update import StackedUpdate
from lora.kernels.step.attention_triton import BLOCK_TOKENS
from lora.kernels.step.ops import Ops
from lora.stacked.apply import StackedAdapters


class StackedFastStep(HandWrittenStep):
    """Trains the adapters of `stacked` together on batches (K·B, T), adapter 0's sequences first.

    Args:
        model: its frozen weights take `dtype` and become views of the step's tensors.
        stacked: its layers' A and B become views of one buffer (K, n).
        ops: operations between the matmuls.
        dtype: compute dtype, and that of the activations.
        weight_decays: of each adapter.
        max_grad_norms: of each adapter, for gradient clipping; 0: no clipping.
        merges: merge W + s·B·A of each adapter once a step; None decides by the model's width.
        own_attention: our own kernels for packed sequences; None decides by their length.
    """

    def __init__(
        self,
        model: Decoder,
        stacked: StackedAdapters,
        ops: Ops,
        dtype: torch.dtype,
        *,
        weight_decays: Sequence[float],
        max_grad_norms: Sequence[float],
        merges: bool | None = None,
        own_attention: bool | None = None,
    ) -> None:
        self._own_attention = own_attention
        # Packed weights stay so: merged ones would be K in the compute dtype for each of them.
        self.base_kind = base_kind(model)
        narrow = model.config.hidden_size < MERGE_BELOW_WIDTH and self.base_kind is None
        self.merges = narrow if merges is None else merges
        device = next(model.parameters()).device
        # Values, gradients and moments in fp32, as in FastStep.
        wide = torch.promote_types(dtype, torch.float32)
        self.flat = StackedFlat(stacked.stack.n_adapters, device, wide)
        with torch.no_grad():
            network = FastNetwork(
                model,
                self.flat,
                ops,
                dtype,
                trains_all=False,
                merges=self.merges,
                own_attention=own_attention,
            )
            self.flat.allocate()
            network.fill()
        self.update = StackedUpdate(
            self.flat,
            ops.stacked_adamw,
            weight_decays=weight_decays,
            max_grad_norms=max_grad_norms,
        )
        # No activation checkpointing: a sweep's waves are sized to what fits without.
        super().__init__(model, ops, network, self.update)

    @torch.no_grad()
    def launch(self, batches: Sequence[Batch], lr: Any, number: int = 1) -> None:
        """Train step `number` of all adapters on the micro-batches, as the base class does."""
        if self.network.needs_own_attention:
            batches = [self._padded(batch) for batch in batches]
        super().launch(batches, lr, number)

    def _padded(self, batch: Batch) -> Batch:
        """Return `batch` with padding at the end of each sequence, for whole tiles: see below."""
        rows, tokens = batch.input_ids.shape
        n_more = whole_tiles(rows // self.flat.n_adapters, tokens) - tokens
        ids, labels, positions, documents = (
            F.pad(tensor, (0, n_more), value=value)
            for tensor, value in (
                (batch.input_ids, 0),
                (batch.labels, IGNORE),
                (batch.position_ids, 0),  # attention reads here where documents begin
                (batch.document_ids, -1),
            )
        )
        return Batch(ids, labels, positions, documents)

    def _allocate(self, batch: Batch) -> None:
        n_tokens = batch.input_ids.numel() // self.flat.n_adapters  # of each adapter
        # A tile of our attention kernels that spans two adapters would carry a NaN from one to the
        # other: masked weights are zero, and 0 · NaN is NaN.
        is_aligned = n_tokens % BLOCK_TOKENS == 0
        self.network.own_attention = self._own_attention if is_aligned else False
        super()._allocate(batch)

    def describe(self) -> str:
        """Return in words which kernels run, in which dtype, and how LoRA is computed."""
        kind = str(self.network.dtype).removeprefix("torch.")
        n = self.flat.n_adapters
        how = "merged once a step, a weight for each" if self.merges else "beside the weights"
        about = f"{self.ops.name} kernels, {kind} matmuls, LoRA of {n} adapters {how}"
        if self.network.scratch is not None:
            about += f"; {self.base_kind} weights unpacked for each of them"
        return about

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring what matmuls read up to date, after A and B were changed from outside."""
        self.network.refresh()


def whole_tiles(batch_size: int, tokens: int) -> int:
    """Return the least length from `tokens` at which B sequences fill tiles of our attention."""
    multiple = BLOCK_TOKENS // math.gcd(BLOCK_TOKENS, batch_size)
    return -(-tokens // multiple) * multiple
