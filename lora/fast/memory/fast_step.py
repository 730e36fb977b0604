"""What a hand-written step holds, by part, found by building it on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from lora.config import BaseWeights, LoRAConfig
from lora.decoder.config import DecoderConfig
from lora.decoder.decoder import Decoder, build_empty_decoder
from lora.fast.hand_written import HandWrittenStep
from lora.fast.llama.buffers import Buffers
from lora.fast.llama.checkpointing import MODES, ActivationCheckpointing, OffloadedResiduals
from lora.fast.llama.network import FastNetwork
from lora.fast.sharded.base import planned_base
from lora.fast.stacked_step import StackedFastStep, whole_tiles
from lora.fast.step import FastStep
from lora.fast.weights.flat import FlatParameters
from lora.fast.weights.packed_tables import PackedTable
from lora.fast.weights.stacked_flat import StackedFlat
from lora.fast.weights.stacked_projection import StackedProjection
from lora.fast.weights.unpacked import UnpackedProjection
from lora.kernels.step.ops import PLAIN
from lora.layers.quantised_model import use_quantised_linears
from lora.stacked.apply import apply_stacked

CUBLAS_WORKSPACE_BYTES = 32 * 2**20
LONG_SEQUENCE_TOKENS = 8192
"""From this length on attention takes the most time to recompute for the bytes of its output."""
USABLE_MEMORY_FRACTION = 0.95
"""Of the free memory: what may be planned for. The rest is for what CUDA and captured graphs hold
outside the allocator's count, and for small fragments."""
USABLE_SHARDED_FRACTION = 0.97
"""The same with sharded weights, whose step has no graphs: 0.9 GB were in use beside the
allocator's peak of 140.9 GB on an H200."""
FRAGMENTED_WEIGHTS_FRACTION = 0.1
"""Of the weights: left free because loading them leaves memory in pieces too small for the step's
largest buffers. Less than what was measured beside 74 GB of a 70B shape in fp8 (12.3 GB in pieces),
but enough there, because smaller tensors go into the pieces (docs/memory.md)."""


@dataclass(frozen=True)
class FastMemory:
    """Bytes on the GPU, as its allocator counts them."""

    weights: int
    """What matmuls, norms and the embedding read, and the fp32 values of what trains."""
    gradients: int
    optimizer: int
    activations: int
    """Saved activations and scratch."""
    loss: int
    """Logits that exist at once."""
    other: int
    """cuBLAS's workspace."""

    @property
    def total(self) -> int:
        """All parts together."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations)
        return sum(parts) + self.loss + self.other


class FastPlan:
    """Sizes of the hand-written step of `model` under any activation checkpointing.

    Changes `model` in place: it is moved to the meta device. LoRA is applied, or all of it trains.
    `shards`: among how many processes the frozen weights are split, of which this plans one; None:
    they are not sharded.
    """

    def __init__(
        self,
        model: Decoder,
        batch_size: int,
        tokens: int,
        *,
        packed: bool = True,
        shards: int | None = None,
    ) -> None:
        if not all(p.is_meta for p in model.parameters()):
            _move_to_meta(model)
        with torch.no_grad():
            base = None if shards is None else planned_base(shards)
            self.step = FastStep(model, PLAIN, torch.bfloat16, base=base)
        self.batch_size, self.tokens, self.packed = batch_size, tokens, packed
        self.n_layers = self.step.network.qkv.n_layers

    @property
    def loaded_bytes(self) -> int:
        """Weights whose loading leaves memory in pieces; a shard is read into its final place."""
        weights, ring = self.memory(MODES["none"]).weights, self.step.network.ring
        return weights if ring is None else weights - ring.held_bytes

    @property
    def usable_fraction(self) -> float:
        """Of the free memory: what may be planned for."""
        is_sharded = self.step.network.ring is not None
        return USABLE_SHARDED_FRACTION if is_sharded else USABLE_MEMORY_FRACTION

    def resized(self, batch_size: int) -> FastPlan:
        """Return the plan of the same step over so many sequences."""
        plan = copy.copy(self)
        plan.batch_size = batch_size
        return plan

    @torch.no_grad()
    def memory(self, checkpointing: ActivationCheckpointing) -> FastMemory:
        """Return what a step holds that stores this of its blocks."""
        step = self.step
        sizes = self.batch_size, self.tokens
        return _count(step, step.flat, *sizes, packed=self.packed, checkpointing=checkpointing)

    def host_bytes(self, checkpointing: ActivationCheckpointing) -> int:
        """Return how much pinned host memory the residuals take."""
        buffers = self.step.network.buffers(self.batch_size, self.tokens, checkpointing)
        residuals = buffers.residuals
        return residuals.host_bytes if isinstance(residuals, OffloadedResiduals) else 0


def _move_to_meta(model: Decoder) -> None:
    """Changes `model` in place: no tensor has values any more; what was tied stays so."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    model.to("meta")
    for first, *others in names.values():
        for name in others:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, model.get_parameter(first))


def fast_memory(
    model: Decoder,
    batch_size: int,
    tokens: int,
    *,
    packed: bool = True,
    checkpointing: ActivationCheckpointing | None = None,
) -> FastMemory:
    """Return what a step of `model` over `batch_size` × `tokens` tokens holds.

    Changes `model` in place, as FastPlan does.
    """
    plan = FastPlan(model, batch_size, tokens, packed=packed)
    return plan.memory(checkpointing or ActivationCheckpointing())


@torch.no_grad()
def stacked_memory(
    config: DecoderConfig,
    loras: Sequence[LoRAConfig],
    batch_size: int,
    tokens: int,
    *,
    packed: bool,
    base: BaseWeights | None = None,
    quantised_weights: Collection[str] | None = None,
) -> FastMemory:
    """Return what a stacked step holds: `batch_size` × `tokens` tokens for each of `loras`."""
    model = build_empty_decoder(config).bfloat16()
    if base is not None:
        use_quantised_linears(model, base, quantised_weights)
    stacked = apply_stacked(model, loras, range(len(loras)))
    none = [0.0] * len(loras)
    step = StackedFastStep(
        model, stacked, PLAIN, torch.bfloat16, weight_decays=none, max_grad_norms=none
    )
    if step.network.needs_own_attention:
        tokens = whole_tiles(batch_size, tokens)
    held = _count(
        step,
        step.flat,
        len(loras) * batch_size,
        tokens,
        packed=packed,
        checkpointing=ActivationCheckpointing(),
    )
    return replace(held, gradients=held.gradients + _gradient_scratch_bytes(step))


def _gradient_scratch_bytes(step: StackedFastStep) -> int:
    """Return what the gradients of one projection take before they are in the flat buffer.

    Of the largest projection: they are freed before the next one's are computed.
    """
    largest = 0
    for projection in step.network.projections:
        if isinstance(projection, StackedProjection):
            fraction = projection.layers_together / projection.n_layers
            scaled = max(slot.values.numel() for _, _, slot, _ in projection.adapted)
            # dA and dB in bf16, and one member's s · dB in fp32.
            allocated = 2 * (projection.a.numel() + projection.b.numel()) + 4 * scaled
            largest = max(largest, round(fraction * allocated))
    return largest


@dataclass(frozen=True)
class MemoryFit:
    """The activation checkpointing that was chosen for a memory budget, and why."""

    checkpointing: ActivationCheckpointing
    memory: FastMemory
    reason: str


def fit_memory(
    plan: FastPlan, mode: str, budget_bytes: int | None, other_bytes: int = 0
) -> MemoryFit:
    """Return the fastest activation checkpointing that fits into `budget_bytes`.

    `mode` narrows it down to one of `lora.fast.llama.checkpointing.MODES`; "auto" goes through all.
    A budget of None is no limit. `other_bytes` are held besides. Where nothing fits it is the
    smallest.
    """
    candidates = _candidates(mode, plan.n_layers, is_long=plan.tokens >= LONG_SEQUENCE_TOKENS)

    def fits(checkpointing: ActivationCheckpointing) -> bool:
        return (
            budget_bytes is None or plan.memory(checkpointing).total + other_bytes <= budget_bytes
        )

    checkpointing = next((one for one in candidates if fits(one)), candidates[-1])
    return fit_with(plan, checkpointing, other_bytes, budget_bytes)


def fit_with(
    plan: FastPlan,
    checkpointing: ActivationCheckpointing,
    other_bytes: int = 0,
    budget_bytes: int | None = None,
) -> MemoryFit:
    """Return what this activation checkpointing comes to."""
    found, none = plan.memory(checkpointing), plan.memory(MODES["none"])
    totals = found.total + other_bytes, none.total + other_bytes
    return MemoryFit(checkpointing, found, _explain(checkpointing, plan, totals, budget_bytes))


def _candidates(mode: str, n_layers: int, *, is_long: bool) -> list[ActivationCheckpointing]:
    """Return the settings of one mode, or of all, the fastest first."""
    # Storing one block less at a time: each candidate is a little slower and smaller than the last.
    if mode == "cheap":
        return [
            ActivationCheckpointing(stores_norms=False, n_stored_gate_up=n)
            for n in range(n_layers, -1, -1)
        ]
    if mode != "auto":
        return [MODES[mode]]
    n_attention = n_layers if is_long else 0
    full = [
        replace(MODES["full"], n_stored_qkv=n, n_stored_attention=n_attention)
        for n in range(n_layers - 1, -1, -1)
    ]
    # Offloading residuals costs less time than recomputing attention over long sequences.
    offload = [
        replace(MODES["full+offload"], n_stored_attention=n) for n in range(n_attention, -1, -1)
    ]
    cheap = _candidates("cheap", n_layers, is_long=is_long)
    return [MODES["none"], *cheap, *full, *offload]


def _explain(
    checkpointing: ActivationCheckpointing,
    plan: FastPlan,
    totals: tuple[int, int],
    budget_bytes: int | None,
) -> str:
    name, (total, none) = checkpointing.mode, totals
    n, (gate_up, qkv, attention) = plan.n_layers, checkpointing.n_stored(plan.n_layers)
    recomputed = {
        "none": "nearly all activations are stored",
        "cheap": "norms and SwiGLU are recomputed"
        + (f", gate and up in {n - gate_up} of {n} blocks" if gate_up < n else ""),
        "full": f"{n - qkv} of {n} blocks are recomputed" + (f", {qkv} in part" if qkv else ""),
        "full+offload": "blocks are recomputed from residuals in host memory "
        f"({plan.host_bytes(checkpointing) / 1e9:.1f} GB)",
    }[name]
    if name.startswith("full") and attention > qkv:
        recomputed += f", but not the attention of {attention - qkv}"
    text = f"activation checkpointing {name}: {recomputed}; {total / 1e9:.1f} GB planned"
    if budget_bytes is not None:
        text += f" of {budget_bytes / 1e9:.1f} GB"
    if name != "none":
        text += f", {none / 1e9:.1f} without checkpointing"
    if budget_bytes is not None and total > budget_bytes:
        text += "; it may not fit"
    return text


def _count(
    step: HandWrittenStep,
    flat: FlatParameters | StackedFlat,
    batch_size: int,
    tokens: int,
    *,
    packed: bool,
    checkpointing: ActivationCheckpointing,
) -> FastMemory:
    buffers = step.network.buffers(batch_size, tokens, checkpointing)
    trained = flat.values.numel() * 4  # fp32
    logits = buffers.logits.numel() * buffers.logits.element_size()
    activations = _bytes_of(buffers) + _torch_attention_bytes(step, buffers, packed=packed)
    return FastMemory(
        weights=_frozen_bytes(step.network, flat) + trained,
        gradients=trained,
        optimizer=2 * trained,
        # Logits in scratch that other phases share are counted once, as the loss's.
        activations=activations - (0 if buffers.phases is None else logits),
        loss=logits,
        other=CUBLAS_WORKSPACE_BYTES,
    )


def _torch_attention_bytes(step: HandWrittenStep, buffers: Buffers, *, packed: bool) -> int:
    """Return what torch's attention saves in all blocks, and allocates in one block's backward."""
    if step.network.uses_own_attention(buffers.tokens, packed=packed):
        return 0
    sizes = step.model.config
    width = sizes.num_attention_heads * sizes.head_dim  # H · D
    log_sums = buffers.n_tokens * sizes.num_attention_heads * 4  # fp32, of each stored block
    n_stored = len(buffers.attention_out.stored) or 1
    # Backward allocates dq, dk and dv in bf16, and dq in fp32. Where query heads share key/value
    # heads, dk and dv exist first for each query head.
    is_grouped = sizes.num_key_value_heads < sizes.num_attention_heads
    by_query_head = 4 * width if is_grouped else 0
    allocated = buffers.n_tokens * (2 * step.network.qkv.outputs + 4 * width + by_query_head)
    return n_stored * log_sums + allocated


def _frozen_bytes(network: FastNetwork, flat: FlatParameters | StackedFlat) -> int:
    """Return the bytes of all tensors that projections and norms hold, each storage once."""
    owners = (*network.projections, *network.weights, *([network.ring] if network.ring else []))
    # By storage, not by tensor: parameters, blocks' weights and members' weights are views.
    storages = {
        storage._cdata: storage.nbytes()
        for owner in owners
        for storage in (tensor.untyped_storage() for tensor in _tensors_of(owner))
    }
    storages.pop(flat.values.untyped_storage()._cdata, None)  # counted as what trains
    return sum(storages.values())


def _tensors_of(owner: object) -> Iterator[torch.Tensor]:
    """Yield the tensors of a projection, a group of weights or a ring."""
    if isinstance(owner, UnpackedProjection | PackedTable):
        yield from owner.packed_tensors()
    for name, value in vars(owner).items():
        if isinstance(owner, UnpackedProjection | PackedTable) and name in ("weights", "room"):
            continue  # scratch, which is among the buffers
        for tensor in value if isinstance(value, list) else [value]:
            if isinstance(tensor, torch.Tensor):
                yield tensor


def _bytes_of(buffers: Buffers) -> int:
    storages = {storage._cdata: storage.nbytes() for storage in buffers.storages()}
    return sum(storages.values())
