"""What a fast step holds, by part, found by building it without values on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lora.config import LoRAConfig
from lora.decoder.config import DecoderConfig
from lora.decoder.decoder import Decoder, build_empty_decoder
from lora.fast.llama.buffers import Buffers
from lora.fast.llama.checkpointing import MODES, ActivationCheckpointing, OffloadedResiduals
from lora.fast.llama.network import FastNetwork
from lora.fast.stacked_step import StackedFastStep
from lora.fast.step import FastStep, HandWrittenStep
from lora.fast.weights.flat import FlatParameters
from lora.fast.weights.stacked_flat import StackedFlat
from lora.fast.weights.stacked_projection import StackedProjection
from lora.kernels.step.ops import PLAIN
from lora.stacked.apply import apply_stacked

CUBLAS_WORKSPACE_BYTES = 32 * 2**20
LONG_SEQUENCE_TOKENS = 8192
"""Rows from this length on: attention's output, made again, takes the most time for its bytes."""
USABLE_MEMORY_FRACTION = 0.95
"""Of the memory that is free: what may be planned for. The rest is for pieces nobody can use."""


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


class FastPlan:
    """Sizes of fast steps of `model` by what they keep, found without values.

    `model` is moved to the meta device, with LoRA applied or all of it training; it is changed.
    """

    def __init__(self, model: Decoder, rows: int, tokens: int, *, packed: bool = True) -> None:
        if not all(p.is_meta for p in model.parameters()):
            model = model.to("meta")
        with torch.no_grad():
            self.step = FastStep(model, PLAIN, torch.bfloat16)
        self.rows, self.tokens, self.packed = rows, tokens, packed
        self.n_layers = self.step.network.qkv.n_layers

    @torch.no_grad()
    def memory(self, checkpointing: ActivationCheckpointing) -> FastMemory:
        """Return what a step holds that keeps this of its blocks."""
        step = self.step
        return _count(
            step, step.flat, self.rows, self.tokens, packed=self.packed, checkpointing=checkpointing
        )

    def host_bytes(self, checkpointing: ActivationCheckpointing) -> int:
        """Return how much pinned host memory the residuals take."""
        buffers = self.step.network.buffers(self.rows, self.tokens, checkpointing).residuals
        return buffers.host_bytes if isinstance(buffers, OffloadedResiduals) else 0


def fast_memory(
    model: Decoder,
    rows: int,
    tokens: int,
    *,
    packed: bool = True,
    checkpointing: ActivationCheckpointing | None = None,
) -> FastMemory:
    """Return what a fast step of `model` over `rows` × `tokens` tokens holds.

    `model` is on the meta device, with LoRA applied or all of it training; it is changed.
    """
    return FastPlan(model, rows, tokens, packed=packed).memory(
        checkpointing or ActivationCheckpointing()
    )


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
    held = _count(
        step,
        step.flat,
        len(loras) * rows,
        tokens,
        packed=packed,
        checkpointing=ActivationCheckpointing(),
    )
    return replace(held, gradients=held.gradients + _gradient_scratch_bytes(step))


def _gradient_scratch_bytes(step: StackedFastStep) -> int:
    """Return what the gradients of one projection take before they are in the flat buffer."""
    most = 0
    for projection in step.network.projections:
        if isinstance(projection, StackedProjection):
            share = projection.layers_together / projection.n_layers
            scaled = max(slot.values.numel() for _, _, slot, _ in projection.adapted)
            made = 2 * (projection.a.numel() + projection.b.numel()) + 4 * scaled
            most = max(most, round(share * made))
    return most


@dataclass(frozen=True)
class MemoryFit:
    """The mode that was found for a room, and why."""

    mode: str
    checkpointing: ActivationCheckpointing
    memory: FastMemory
    reason: str


def fit_memory(
    plan: FastPlan, mode: str, budget_bytes: int | None, other_bytes: int = 0
) -> MemoryFit:
    """Return the fastest way to keep blocks that fits into `budget_bytes`.

    `mode` narrows it down to one of `lora.fast.llama.checkpointing.MODES`; "auto" goes through all.
    A budget of None is no limit. `other_bytes` are held besides. Where nothing fits it is the
    smallest.
    """
    ways = _ways(mode, plan.n_layers, is_long=plan.tokens >= LONG_SEQUENCE_TOKENS)

    def fits(checkpointing: ActivationCheckpointing) -> bool:
        return (
            budget_bytes is None or plan.memory(checkpointing).total + other_bytes <= budget_bytes
        )

    checkpointing = next((way for way in ways if fits(way)), ways[-1])
    return fit_with(plan, checkpointing, other_bytes, budget_bytes)


def fit_with(
    plan: FastPlan,
    checkpointing: ActivationCheckpointing,
    other_bytes: int = 0,
    budget_bytes: int | None = None,
) -> MemoryFit:
    """Return what keeping this of the blocks comes to."""
    found, none = plan.memory(checkpointing), plan.memory(MODES["none"])
    totals = found.total + other_bytes, none.total + other_bytes
    name = checkpointing.mode
    return MemoryFit(
        name, checkpointing, found, _explain(name, checkpointing, plan, totals, budget_bytes)
    )


def _ways(mode: str, n_layers: int, *, is_long: bool) -> list[ActivationCheckpointing]:
    """Return the ways of one mode, or of all, the fastest first."""
    if mode == "cheap":
        return [
            ActivationCheckpointing(stores_norms=False, n_stored_gate_up=n)
            for n in range(n_layers, -1, -1)
        ]
    if mode != "auto":
        return [MODES[mode]]
    attention_out = n_layers if is_long else 0
    full = [
        replace(MODES["full"], n_stored_qkv=n, n_stored_attention=attention_out)
        for n in range(n_layers - 1, -1, -1)
    ]
    # Residuals on the host cost less time than attention that is made again over long rows.
    offload = [
        replace(MODES["full+offload"], n_stored_attention=n) for n in range(attention_out, -1, -1)
    ]
    cheap = _ways("cheap", n_layers, is_long=is_long)
    return [MODES["none"], *cheap, *full, *offload]


def _explain(
    name: str,
    checkpointing: ActivationCheckpointing,
    plan: FastPlan,
    totals: tuple[int, int],
    budget_bytes: int | None,
) -> str:
    total, none = totals
    n, (gate_up, inner, attention_out) = plan.n_layers, checkpointing.n_stored(plan.n_layers)
    again = {
        "none": "nearly nothing is made again",
        "cheap": "norms and SwiGLU are made again"
        + (f", gate and up in {n - gate_up} of {n} blocks" if gate_up < n else ""),
        "full": f"{n - inner} of {n} blocks are made again"
        + (f", {inner} in part" if inner else ""),
        "full+offload": "blocks are made again from residuals in host memory "
        f"({plan.host_bytes(checkpointing) / 1e9:.1f} GB)",
    }[name]
    if name.startswith("full") and attention_out > inner:
        again += f", but not the attention of {attention_out - inner}"
    text = f"memory {name}: {again}; {total / 1e9:.1f} GB planned"
    if budget_bytes is not None:
        text += f" of {budget_bytes / 1e9:.1f} GB"
    if name != "none":
        text += f", without it {none / 1e9:.1f}"
    if budget_bytes is not None and total > budget_bytes:
        text += "; it may not fit"
    return text


def _count(
    step: HandWrittenStep,
    flat: FlatParameters | StackedFlat,
    rows: int,
    tokens: int,
    *,
    packed: bool,
    checkpointing: ActivationCheckpointing,
) -> FastMemory:
    buffers = step.network.buffers(rows, tokens, checkpointing)
    trained = flat.values.numel() * 4
    return FastMemory(
        weights=_frozen_bytes(step.network, flat) + trained,
        gradients=trained,
        optimizer=2 * trained,
        activations=_bytes_of(buffers) + _of_attention(step, buffers, packed=packed),
        loss=buffers.logits.numel() * buffers.logits.element_size(),
        other=CUBLAS_WORKSPACE_BYTES,
    )


def _of_attention(step: HandWrittenStep, buffers: Buffers, *, packed: bool) -> int:
    """Return what torch's attention keeps, sums of its rows, and makes on one block's way back.

    That are its output or gradients of queries, keys and values, and dq in fp32; gradients of keys
    and values first for each of the heads that share them.
    """
    if packed and step.network.uses_own_attention(buffers.tokens):
        return 0
    sizes = step.model.config
    inner = sizes.num_attention_heads * sizes.head_dim
    sums = buffers.n_tokens * sizes.num_attention_heads * 4
    is_stored = len(buffers.attention_out.stored) or 1
    for_each = 4 * inner if sizes.num_key_value_heads < sizes.num_attention_heads else 0
    made = buffers.n_tokens * (2 * step.network.qkv.outputs + 4 * inner + for_each)
    return is_stored * sums + made


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


def _bytes_of(buffers: Buffers) -> int:
    storages = {storage._cdata: storage.nbytes() for storage in buffers.storages()}
    return sum(storages.values())
