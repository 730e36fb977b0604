"""What a fast step holds, by part, found by building it without values on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora.decoder.decoder import Decoder
from lora.fast.buffers import Buffers
from lora.fast.ops import PLAIN
from lora.fast.step import FastStep

CUBLAS_WORKSPACE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class FastMemory:
    """Bytes on the GPU, as its allocator counts them."""

    weights: int
    """What products, norms and the embedding read, fp32 values of what trains among them."""
    gradients: int
    optimizer: int
    activations: int
    """What is kept for the way back, and what passes."""
    loss: int
    """Logits that exist at once."""
    other: int
    """The library's workspace."""

    @property
    def total(self) -> int:
        """All parts together."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations)
        return sum(parts) + self.loss + self.other


@torch.no_grad()
def fast_memory(model: Decoder, rows: int, tokens: int, *, packed: bool = True) -> FastMemory:
    """Return what a fast step of `model` over `rows` × `tokens` tokens holds.

    `model` is on the meta device, with LoRA applied or all of it training; it is changed.
    """
    if not all(p.is_meta for p in model.parameters()):
        model = model.to("meta")
    step = FastStep(model, PLAIN, torch.bfloat16)
    kept = step.network.buffers(rows, tokens)
    flat = step.flat.values.numel() * 4
    return FastMemory(
        weights=_frozen_bytes(step) + flat,
        gradients=flat,
        optimizer=2 * flat,
        activations=_bytes_of(kept) + _kept_by_attention(step, kept, packed=packed),
        loss=kept.logits.numel() * kept.logits.element_size(),
        other=CUBLAS_WORKSPACE_BYTES,
    )


def _frozen_bytes(step: FastStep) -> int:
    """Return the bytes of all tensors that projections and norms hold, each storage once."""
    network = step.network
    owners = (*network.projections, *network.weights)
    storages = {}
    flat = step.flat.values.untyped_storage()._cdata
    for owner in owners:
        for value in vars(owner).values():
            for tensor in value if isinstance(value, list) else [value]:
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    storages[storage._cdata] = storage.nbytes()
    storages.pop(flat, None)
    return sum(storages.values())


def _bytes_of(kept: Buffers) -> int:
    tensors = {name: t for name, t in vars(kept).items() if isinstance(t, torch.Tensor)}
    tensors.pop("logits")
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _kept_by_attention(step: FastStep, kept: Buffers, *, packed: bool) -> int:
    """Return what torch's attention keeps for autograd: its output and the sums of its rows."""
    if packed and step.network.owns_attention(kept.tokens):
        return 0
    sizes = step.model.config
    inner = sizes.num_attention_heads * sizes.head_dim
    a_layer = kept.n_tokens * (inner * 2 + sizes.num_attention_heads * 4)
    return sizes.num_hidden_layers * a_layer
