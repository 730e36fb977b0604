"""The memory plan of a training run, by part, and the batch that fits, before weights are read.

A CPU run is planned as the plain step and measured as the process's resident memory; a GPU run is
planned as the step that it will take and measured by torch's allocator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lora.adapters.apply import apply_lora
from lora.config import LoRAConfig, MemoryConfig
from lora.decoder.config import DecoderConfig
from lora.decoder.decoder import Decoder, build_empty_decoder
from lora.decoder.quantised import use_fp8_linears
from lora.device import resident_bytes
from lora.errors import ConfigError
from lora.fast.choose import why_not_hand_written
from lora.fast.llama.checkpointing import ActivationCheckpointing
from lora.fast.memory.fast_step import CUBLAS_WORKSPACE_BYTES, FastPlan, fit_memory, fit_with
from lora.fast.memory.trace import StepMemory, trace_step
from lora.lora_module import ParameterCounts, count_lora_parameters

CPU_SLACK = 0.3
"""Of activations and loss: what a CPU's allocator holds besides, fragments too small for the next
allocation (measured in docs/memory.md)."""
CAPTURED_LOSS_BYTES = 14
"""Of a logit in a captured step: bf16 and fp32 values, log-softmax, and parts of two gradients."""


@dataclass(frozen=True)
class PlanInputs:
    """What a run's memory depends on."""

    config: DecoderConfig
    lora: LoRAConfig | None
    """None: all weights train."""
    micro_batch_size: int
    """Sequences, B."""
    tokens: int
    """Of a sequence, T."""
    device_type: str
    """cpu or cuda."""
    compute_dtype: torch.dtype
    micro_batches: int = 1
    packed: bool = True
    learned_fraction: float = 1.0
    """Of the tokens: those with a target in the loss."""
    fast: bool = True
    """Take the fastest step that can train the model; false: the plain one."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """The fast step's mode of activation checkpointing; "auto" without `memory_gb` is "none"."""
    checkpointing: ActivationCheckpointing | None = None
    """The same where it is decided already, as in a resumed run."""
    fp8: bool = False
    """Store the frozen linears in fp8."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the peak of a step, by part."""

    step: str
    """Which step was planned: plain, fast or captured."""
    trained_parameters: int
    parameters: int
    weights: int
    gradients: int
    """Those that exist while activations peak, or all where these are more."""
    optimizer: int
    activations: int
    loss: int
    other: int
    """Of the process: Python and its libraries, the allocator's fragments; on a GPU cuBLAS's
    workspace, and a validation pass beside a graph that holds its buffers."""
    checkpointing: ActivationCheckpointing | None = None
    """What the fast step stores of its blocks."""
    reason: str = ""
    """The same in one line, with the reason."""

    @property
    def total(self) -> int:
        """All parts together."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations)
        return sum(parts) + self.loss + self.other

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as values that JSON holds, under the names of the first version."""
        record = {**asdict(self), "total": self.total}
        del record["checkpointing"]
        policy = self.checkpointing
        record["keep"] = None if policy is None else policy.to_record()
        return record


def plan_memory(inputs: PlanInputs, base_bytes: int | None = None) -> MemoryPlan:
    """Return the plan of a training run.

    `base_bytes` is what the process holds without the model; left out, it is what this one holds
    now. Raises ConfigError for sizes too small to train on, TargetError for LoRA that fits no
    layer.
    """
    if inputs.micro_batch_size < 1 or inputs.tokens < 2:
        raise ConfigError(
            f"Cannot plan a micro-batch of {inputs.micro_batch_size} sequences of {inputs.tokens} "
            "tokens. Allowed: at least 1 sequence of 2 tokens."
        )
    model = _adapted(inputs)
    counts = count_lora_parameters(model)
    on_gpu = inputs.device_type == "cuda"
    if on_gpu and inputs.fast and inputs.compute_dtype is torch.bfloat16:
        if why_not_hand_written(model) is None:
            return _plan_fast(inputs, model, counts)
        return _plan_traced(inputs, counts, "captured", CUBLAS_WORKSPACE_BYTES)
    if on_gpu:
        return _plan_traced(inputs, counts, "plain", CUBLAS_WORKSPACE_BYTES)
    base = resident_bytes() if base_bytes is None else base_bytes
    return _plan_traced(inputs, counts, "plain", base)


def largest_micro_batch(
    inputs: PlanInputs, available_bytes: int, base_bytes: int | None = None
) -> int:
    """Return the most sequences of a micro-batch that fit into `available_bytes`; 0: not even one.

    Memory is linear in the micro-batch size: two plans give the line, a third one checks.
    """

    def total(micro_batch_size: int) -> int:
        return plan_memory(_resized(inputs, micro_batch_size), base_bytes).total

    first = total(1)
    if first > available_bytes:
        return 0
    # Far apart, because the loss takes its tokens in chunks: it grows only until the first is full.
    far = max(2, -(-8192 // inputs.tokens))
    slope = (total(far) - first) / (far - 1)
    size = max(1, int(1 + (available_bytes - first) / max(1.0, slope)))
    while size > 1 and total(size) > available_bytes:
        size = min(size - 1, int(size * 0.97))
    return size


def _resized(inputs: PlanInputs, micro_batch_size: int) -> PlanInputs:
    return replace(inputs, micro_batch_size=micro_batch_size)


def _adapted(inputs: PlanInputs) -> Decoder:
    model = build_empty_decoder(inputs.config)
    # Full fine-tuning trains fp32 weights; LoRA's frozen base is stored in the compute dtype.
    if inputs.lora is not None and inputs.compute_dtype is torch.bfloat16:
        model = model.bfloat16()
    _prepare(inputs)(model)
    return model


def _prepare(inputs: PlanInputs) -> Callable[[Decoder], nn.Module]:
    if inputs.lora is None:
        return lambda model: model.requires_grad_(True)
    lora = inputs.lora

    def adapt(model: Decoder) -> nn.Module:
        if inputs.fp8:
            use_fp8_linears(model)
        return apply_lora(model, lora)

    return adapt


def _plan_fast(inputs: PlanInputs, model: Decoder, counts: ParameterCounts) -> MemoryPlan:
    plan = FastPlan(model, inputs.micro_batch_size, inputs.tokens, packed=inputs.packed)
    # A validation pass runs beside the buffers, which a graph never gives back.
    evaluation, gb = evaluation_bytes(inputs), inputs.memory.memory_gb
    if inputs.checkpointing is not None:
        fit = fit_with(plan, inputs.checkpointing, evaluation)
    else:
        budget = None if gb is None else round(gb * 1e9)
        fit = fit_memory(plan, inputs.memory.memory, budget, evaluation)
    parts = {**vars(fit.memory), "other": fit.memory.other + evaluation}
    return MemoryPlan(
        "fast",
        counts.trainable,
        counts.total,
        **parts,
        checkpointing=fit.checkpointing,
        reason=fit.reason,
    )


def _plan_traced(inputs: PlanInputs, counts: ParameterCounts, step: str, base: int) -> MemoryPlan:
    traced = _trace(inputs)
    trained = counts.trainable * 4  # fp32
    gradients, loss = traced.gradients, traced.loss
    if step == "captured":
        loss = (
            CAPTURED_LOSS_BYTES * inputs.micro_batch_size * inputs.tokens * inputs.config.vocab_size
        )
        base += evaluation_bytes(inputs)  # the graph holds its memory pool meanwhile
    if step == "captured" or inputs.micro_batches > 1 or inputs.lora is not None:
        gradients = trained  # of the micro-batches before, or in one flat buffer
    return MemoryPlan(
        step=step,
        trained_parameters=counts.trainable,
        parameters=counts.total,
        weights=_frozen_bytes(inputs, counts) + trained,
        gradients=gradients,
        optimizer=2 * trained,
        activations=traced.activations,
        loss=loss,
        other=base + _slack(inputs, traced),
    )


def _frozen_bytes(inputs: PlanInputs, counts: ParameterCounts) -> int:
    """Return the bytes of what does not train, in its storage dtype."""
    if not inputs.fp8:
        return counts.frozen * _base_dtype(inputs).itemsize
    model = _adapted(inputs)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return sum(t.numel() * t.element_size() for t in (*frozen, *model.buffers()))


def evaluation_bytes(inputs: PlanInputs) -> int:
    """Return what a validation pass takes; beside a graph, which holds its buffers, it adds up."""
    traced = _trace(inputs, learns=False)
    return traced.activations + traced.loss


def _trace(inputs: PlanInputs, *, learns: bool = True) -> StepMemory:
    return trace_step(
        inputs.config,
        _prepare(inputs),
        inputs.micro_batch_size,
        inputs.tokens,
        dtype=_base_dtype(inputs),
        compute_dtype=inputs.compute_dtype,
        packed=inputs.packed,
        learned_fraction=inputs.learned_fraction,
        learns=learns,
    )


def _base_dtype(inputs: PlanInputs) -> torch.dtype:
    """Return the dtype of the weights that stay frozen; what trains is fp32."""
    return torch.float32 if inputs.lora is None else inputs.compute_dtype


def _slack(inputs: PlanInputs, traced: StepMemory) -> int:
    if inputs.device_type == "cuda":  # its peak counts live tensors, not what is cached or split
        return 0
    return round(CPU_SLACK * (traced.activations + traced.loss))
