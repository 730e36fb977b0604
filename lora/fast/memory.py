"""What a fast step holds, by part, found by building it without values on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lora.apply_stacked import apply_stacked
from lora.config import LoRAConfig
from lora.decoder.config import DecoderConfig
from lora.decoder.decoder import Decoder, build_empty_decoder
from lora.fast.buffers import Buffers
from lora.fast.flat import FlatParameters
from lora.fast.network import FastNetwork
from lora.fast.ops import PLAIN
from lora.fast.stacked_flat import StackedFlat
from lora.fast.stacked_projection import StackedProjection
from lora.fast.stacked_step import StackedFastStep
from lora.fast.step import FastStep, WrittenStep

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
    return _count(step, step.flat, rows, tokens, packed=packed)


@torch.no_grad()
def stacked_memory(
    config: DecoderConfig, loras: Sequence[LoRAConfig], rows: int, tokens: int, *, packed: bool
) -> FastMemory:
    """Return what a fast stacked step holds: `rows` × `tokens` tokens for each of `loras`."""
    model = build_empty_decoder(config).bfloat16()
    stacked = apply_stacked(model, loras, range(len(loras)))
    none = [0.0] * len(loras)
    step = StackedFastStep(
        model, stacked, PLAIN, torch.bfloat16, weight_decays=none, max_grad_norms=none
    )
    held = _count(step, step.flat, len(loras) * rows, tokens, packed=packed)
    return replace(held, gradients=held.gradients + _made_by_receiving(step))


def _made_by_receiving(step: StackedFastStep) -> int:
    """Return what the gradients of one projection take before they are in the flat buffer."""
    most = 0
    for projection in step.network.projections:
        if isinstance(projection, StackedProjection):
            share = projection.layers_together / projection.n_layers
            scaled = max(slot.values.numel() for _, _, slot, _ in projection.adapted)
            made = 2 * (projection.a.numel() + projection.b.numel()) + 4 * scaled
            most = max(most, round(share * made))
    return most


def _count(
    step: WrittenStep, flat: FlatParameters | StackedFlat, rows: int, tokens: int, *, packed: bool
) -> FastMemory:
    kept = step.network.buffers(rows, tokens)
    trained = flat.values.numel() * 4
    return FastMemory(
        weights=_frozen_bytes(step.network, flat) + trained,
        gradients=trained,
        optimizer=2 * trained,
        activations=_bytes_of(kept) + _kept_by_attention(step, kept, packed=packed),
        loss=kept.logits.numel() * kept.logits.element_size(),
        other=CUBLAS_WORKSPACE_BYTES,
    )


def _frozen_bytes(network: FastNetwork, flat: FlatParameters | StackedFlat) -> int:
    """Return the bytes of all tensors that projections and norms hold, each storage once."""
    owners = (*network.projections, *network.weights)
    storages = {}
    trained = flat.values.untyped_storage()._cdata
    for owner in owners:
        for value in vars(owner).values():
            for tensor in value if isinstance(value, list) else [value]:
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    storages[storage._cdata] = storage.nbytes()
    storages.pop(trained, None)
    return sum(storages.values())


def _bytes_of(kept: Buffers) -> int:
    tensors = {name: t for name, t in vars(kept).items() if isinstance(t, torch.Tensor)}
    tensors.pop("logits")
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _kept_by_attention(step: WrittenStep, kept: Buffers, *, packed: bool) -> int:
    """Return what torch's attention keeps for autograd: its output and the sums of its rows."""
    if packed and step.network.owns_attention(kept.tokens):
        return 0
    sizes = step.model.config
    inner = sizes.num_attention_heads * sizes.head_dim
    a_layer = kept.n_tokens * (inner * 2 + sizes.num_attention_heads * 4)
    return sizes.num_hidden_layers * a_layer
