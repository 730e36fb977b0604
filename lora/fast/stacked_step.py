"""The fast training step of K stacked adapters: one forward and backward over the rows of all."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder
from lora.fast.llama.network import FastNetwork
from lora.fast.step import MERGE_BELOW_WIDTH, HandWrittenStep
from lora.fast.weights.stacked_flat import StackedFlat
from lora.fast.weights.stacked_update import StackedUpdate
from lora.kernels.step.attention_triton import BLOCK_KEYS
from lora.kernels.step.ops import Ops
from lora.stacked.apply import StackedAdapters


class StackedFastStep(HandWrittenStep):
    """Trains the adapters of `stacked`, all at once, on batches (K·B, T), adapter 0's rows first.

    Args:
        model: its frozen weights take `dtype` and become views of the step's tensors.
        stacked: its layers' A and B become views of one buffer (K, n).
        ops: what lies between the products.
        dtype: of products and activations.
        weight_decays: of each adapter.
        max_grad_norms: of each adapter; 0 leaves its gradients alone.
        merges: make W + s·B·A of each adapter once a step; None decides by the model's width.
        own_attention: of packed rows through our kernels; None decides by the rows' length.
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
        self.merges = model.config.hidden_size < MERGE_BELOW_WIDTH if merges is None else merges
        device = next(model.parameters()).device
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
        super().__init__(model, ops, network, self.update)

    def _make_room(self, batch: Batch) -> None:
        each = batch.input_ids.numel() // self.flat.n_adapters
        # A tile of our attention kernels that spans two adapters would bring a NaN across.
        self.network.own_attention = self._own_attention if each % BLOCK_KEYS == 0 else False
        super()._make_room(batch)

    def describe(self) -> str:
        """Return in words what lies between the products, and how LoRA goes beside them."""
        kind = str(self.network.dtype).removeprefix("torch.")
        n = self.flat.n_adapters
        how = "merged once a step, a weight for each" if self.merges else "beside the weights"
        return f"{self.ops.name} kernels, {kind} products, LoRA of {n} adapters {how}"

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring what products read up to date, after A and B were changed from outside."""
        self.network.refresh()
