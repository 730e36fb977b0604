"""What a training run will hold in memory, by part, and which batch fits: before weights are read.

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
from lora.fast.choose import why_not_written
from lora.fast.llama.checkpointing import ActivationCheckpointing
from lora.fast.memory.fast_step import CUBLAS_WORKSPACE_BYTES, FastPlan, fit_memory, fit_with
from lora.fast.memory.trace import StepMemory, trace_step
from lora.lora_module import ParameterCounts, count_lora_parameters

CPU_SLACK = 0.3
"""Share of what a step makes that the allocator of a CPU holds besides: pieces too small for what
comes next (docs/memory.md has the measurements)."""
CAPTURED_LOSS_BYTES = 14
"""A logit in a captured step: its bf16 and fp32 values, log-softmax, and two gradients in part."""


@dataclass(frozen=True)
class Setting:
    """What decides how much memory a run takes."""

    config: DecoderConfig
    lora: LoRAConfig | None
    """None: all weights train."""
    rows: int
    """Of one micro-batch, B."""
    tokens: int
    """Of a row, T."""
    device_type: str
    """cpu or cuda."""
    compute_dtype: torch.dtype
    micro_batches: int = 1
    packed: bool = True
    learned_fraction: float = 1.0
    """Share of the tokens that are learned from."""
    fast: bool = True
    """Take the fastest step that can train the model; false: the plain one."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """What the fast step keeps; "auto" without `memory_gb` is "none"."""
    checkpointing: ActivationCheckpointing | None = None
    """The same, where it was decided before."""
    fp8: bool = False
    """Keep the frozen linears in eight bits."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the fullest moment of a step, by part."""

    step: str
    """Which step was planned: plain, fast or captured."""
    trained_parameters: int
    parameters: int
    weights: int
    gradients: int
    """Those that are there while activations are the most, or all where they are more."""
    optimizer: int
    activations: int
    loss: int
    other: int
    """Of the process: Python and its libraries, the allocator's slack; on a GPU its library's room,
    and an evaluation beside a graph that keeps its buffers."""
    checkpointing: ActivationCheckpointing | None = None
    """What the fast step keeps of its blocks."""
    reason: str = ""
    """The same in one line, and why."""

    @property
    def total(self) -> int:
        """All parts together."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations)
        return sum(parts) + self.loss + self.other

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as values that JSON holds."""
        record = {**asdict(self), "total": self.total}
        del record["checkpointing"]
        policy = self.checkpointing
        record["keep"] = None if policy is None else policy.to_record()
        return record


def plan_memory(setting: Setting, base_bytes: int | None = None) -> MemoryPlan:
    """Return what a training run of this setting holds.

    `base_bytes` is what the process holds without the model; left out, it is what this one holds
    now. Raises ConfigError for rows or tokens below 1, TargetError for LoRA that fits no layer.
    """
    if setting.rows < 1 or setting.tokens < 2:
        raise ConfigError(
            f"A plan was asked for {setting.rows} rows of {setting.tokens} tokens: at least 1 row "
            "of 2 tokens is needed."
        )
    model = _adapted(setting)
    counts = count_lora_parameters(model)
    on_gpu = setting.device_type == "cuda"
    if on_gpu and setting.fast and setting.compute_dtype is torch.bfloat16:
        if why_not_written(model) is None:
            return _plan_fast(setting, model, counts)
        return _plan_traced(setting, counts, "captured", CUBLAS_WORKSPACE_BYTES)
    if on_gpu:
        return _plan_traced(setting, counts, "plain", CUBLAS_WORKSPACE_BYTES)
    base = resident_bytes() if base_bytes is None else base_bytes
    return _plan_traced(setting, counts, "plain", base)


def largest_batch(setting: Setting, available_bytes: int, base_bytes: int | None = None) -> int:
    """Return how many rows of one micro-batch fit into `available_bytes`; 0: not even one.

    Memory grows with the rows along a line, so two plans tell, and a third one checks.
    """

    def total(rows: int) -> int:
        return plan_memory(_with_rows(setting, rows), base_bytes).total

    first = total(1)
    if first > available_bytes:
        return 0
    # Far apart, so that what does not grow (the loss takes its tokens in parts) is told apart.
    far = max(2, -(-8192 // setting.tokens))
    slope = (total(far) - first) / (far - 1)
    rows = max(1, int(1 + (available_bytes - first) / max(1.0, slope)))
    while rows > 1 and total(rows) > available_bytes:
        rows = min(rows - 1, int(rows * 0.97))
    return rows


def _with_rows(setting: Setting, rows: int) -> Setting:
    return replace(setting, rows=rows)


def _adapted(setting: Setting) -> Decoder:
    model = build_empty_decoder(setting.config)
    if setting.lora is not None and setting.compute_dtype is torch.bfloat16:
        model = model.bfloat16()
    _prepare(setting)(model)
    return model


def _prepare(setting: Setting) -> Callable[[Decoder], nn.Module]:
    if setting.lora is None:
        return lambda model: model.requires_grad_(True)
    lora = setting.lora

    def adapt(model: Decoder) -> nn.Module:
        if setting.fp8:
            use_fp8_linears(model)
        return apply_lora(model, lora)

    return adapt


def _plan_fast(setting: Setting, model: Decoder, counts: ParameterCounts) -> MemoryPlan:
    plan = FastPlan(model, setting.rows, setting.tokens, packed=setting.packed)
    evaluation, gb = evaluation_bytes(setting), setting.memory.memory_gb
    if setting.checkpointing is not None:
        fit = fit_with(plan, setting.checkpointing, evaluation)
    else:
        room = None if gb is None else round(gb * 1e9)
        fit = fit_memory(plan, setting.memory.memory, room, evaluation)
    parts = {**vars(fit.memory), "other": fit.memory.other + evaluation}
    return MemoryPlan(
        "fast",
        counts.trainable,
        counts.total,
        **parts,
        checkpointing=fit.checkpointing,
        reason=fit.reason,
    )


def _plan_traced(setting: Setting, counts: ParameterCounts, step: str, base: int) -> MemoryPlan:
    made = _trace(setting)
    trained = counts.trainable * 4
    gradients, loss = made.gradients, made.loss
    if step == "captured":
        loss = CAPTURED_LOSS_BYTES * setting.rows * setting.tokens * setting.config.vocab_size
        base += evaluation_bytes(setting)
    if step == "captured" or setting.micro_batches > 1 or setting.lora is not None:
        gradients = trained  # those of the micro-batches before, or one flat buffer
    return MemoryPlan(
        step=step,
        trained_parameters=counts.trainable,
        parameters=counts.total,
        weights=_frozen_bytes(setting, counts) + trained,
        gradients=gradients,
        optimizer=2 * trained,
        activations=made.activations,
        loss=loss,
        other=base + _slack(setting, made),
    )


def _frozen_bytes(setting: Setting, counts: ParameterCounts) -> int:
    """Return the bytes of what does not train, in the types that it is kept in."""
    if not setting.fp8:
        return counts.frozen * _base_dtype(setting).itemsize
    model = _adapted(setting)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return sum(t.numel() * t.element_size() for t in (*frozen, *model.buffers()))


def evaluation_bytes(setting: Setting) -> int:
    """Return what evaluating takes: beside a graph, whose buffers stay, it comes on top."""
    made = _trace(setting, learns=False)
    return made.activations + made.loss


def _trace(setting: Setting, *, learns: bool = True) -> StepMemory:
    return trace_step(
        setting.config,
        _prepare(setting),
        setting.rows,
        setting.tokens,
        dtype=_base_dtype(setting),
        compute_dtype=setting.compute_dtype,
        packed=setting.packed,
        learned_fraction=setting.learned_fraction,
        learns=learns,
    )


def _base_dtype(setting: Setting) -> torch.dtype:
    """Return the type of the weights that stay frozen; what trains is fp32."""
    return torch.float32 if setting.lora is None else setting.compute_dtype


def _slack(setting: Setting, made: StepMemory) -> int:
    if setting.device_type == "cuda":
        return 0
    return round(CPU_SLACK * (made.activations + made.loss))
