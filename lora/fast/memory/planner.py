"""The memory plan of a training run, by part, and the batch that fits, before weights are read.

A CPU run is planned as the plain step and measured as the process's resident memory; a GPU run is
planned as the step that it will take and measured by torch's allocator. Of a run on several devices
the plan is of one of them, and `lora.fast.memory.parallel` chooses between ddp and fsdp.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from lora.adapters.apply import apply_lora, train_token_rows
from lora.config import BaseWeights, MemoryConfig
from lora.decoder.config import DecoderConfig
from lora.decoder.decoder import Decoder
from lora.decoder.language_model import LanguageModel
from lora.device import resident_bytes
from lora.errors import ConfigError, ModelError, TargetError
from lora.fast.llama.checkpointing import MODES
from lora.fast.memory.estimate import estimate_step
from lora.fast.memory.fast_step import (
    CUBLAS_WORKSPACE_BYTES,
    FRAGMENTED_WEIGHTS_FRACTION,
    USABLE_MEMORY_FRACTION,
    FastPlan,
    MemoryFit,
    fit_memory,
    fit_with,
)
from lora.fast.memory.fsdp import fsdp_weights, plan_fsdp, recompute_blocks
from lora.fast.memory.over_nf4 import nf4_saving
from lora.fast.memory.plan import MemoryPlan, PlanInputs
from lora.fast.memory.trace import StepMemory
from lora.fast.memory.traces import StepTraces, Traced, largest_that_fits
from lora.fast.why_not import why_not_hand_written, why_not_sharded
from lora.lora_module import ParameterCounts, count_lora_parameters
from lora.pretrained.load.models import (
    as_decoder,
    empty_language_model,
    quantise_empty_model,
    why_not_packed,
)
from lora.pretrained.load.task import check_native_only

CPU_SLACK = {"auto": 0.3, "nf4": 0.15, "fp8": 0.75, "int8": 0.75}
"""Of activations and loss: what a CPU's allocator holds besides, fragments too small for the next
allocation, by the base's dtype (measured in docs/memory.md). Linears over fp8 and int8 free more
between what is saved."""
NCCL_BYTES = 1_000_000_000
"""What several processes leave free on each GPU: NCCL's buffers, outside of torch's allocator. On
two H200 0.8 GB were measured (`device_gb` in benchmarks/results/gpu_many_2_h200.jsonl)."""
LEANER_FRACTION = 0.9
"""Of the plan that ran out of memory: what the next one may hold."""
MIN_FAR_TOKENS = 2048
"""Of the micro-batches from which larger ones are estimated."""


def plan_memory(inputs: PlanInputs, base_bytes: int | None = None) -> MemoryPlan:
    """Return the plan of a training run.

    `base_bytes` is what the process holds without the model; left out, it is what this one holds
    now. Raises ConfigError for sizes too small to train on, TargetError for LoRA that fits no
    layer.
    """
    return MemoryPlanner(inputs, base_bytes).plan()


def largest_micro_batch(
    inputs: PlanInputs, available_bytes: int, base_bytes: int | None = None
) -> int:
    """Return the most sequences of a micro-batch that fit into `available_bytes`; 0: not even one.

    Raises what `plan_memory` does.
    """
    return MemoryPlanner(inputs, base_bytes).largest_micro_batch(available_bytes)


def evaluation_bytes(inputs: PlanInputs) -> int:
    """Return what a validation pass takes; beside a graph, which holds its buffers, it adds up."""
    return MemoryPlanner(inputs).evaluation_bytes(inputs.micro_batch_size)


class MemoryPlanner:
    """Plans one run at any size of its micro-batch and in any mode of activation checkpointing.

    The model is built once and traced once for each size, so that more plans of a run cost little.
    Raises what `plan_memory` does.
    """

    def __init__(self, inputs: PlanInputs, base_bytes: int | None = None) -> None:
        if inputs.micro_batch_size < 1 or inputs.tokens < 2:
            raise ConfigError(
                f"Cannot plan a micro-batch of {inputs.micro_batch_size} sequences of "
                f"{inputs.tokens} tokens. Allowed: at least 1 sequence of 2 tokens."
            )
        self.inputs = inputs
        model, shards = _adapted(inputs), inputs.parallel == "fsdp"
        decoder = model if isinstance(model, Decoder) else None
        self._counts = count_lora_parameters(model)
        self._frozen = _frozen_bytes(inputs, model, self._counts)
        on_gpu, self._step, self._fast = inputs.device_type == "cuda", "plain", None
        if on_gpu and inputs.fast and inputs.compute_dtype is torch.bfloat16:
            is_fast = decoder is not None and why_not_hand_written(decoder) is None
            self._step = "fast" if is_fast else "captured"
        is_divisible = decoder is not None and why_not_sharded(decoder) is None
        if shards and (self._step != "fast" or inputs.lora is None or not is_divisible):
            self._step = "plain"  # with FSDP2
        self._nf4_saving = nf4_saving(model, self._step)
        self._fsdp = None
        if decoder is not None and shards and self._step == "plain":
            self._fsdp = fsdp_weights(decoder)
            if on_gpu:
                recompute_blocks(decoder)
        # The tracer and the fast plan both change their model. A copy, because applying LoRA again
        # would say again what there is to say about it.
        self._traces = StepTraces(
            copy.deepcopy(model) if self._step == "fast" else model,
            inputs.tokens,
            compute_dtype=inputs.compute_dtype,
            packed=inputs.packed,
            learned_fraction=inputs.learned_fraction,
            captured=self._step == "captured",
            on_gpu=on_gpu,
            # A gradient of sharded weights is gone when each device has its share of the sum.
            holds_gradients=not (shards and inputs.lora is None),
            about=_describe_model(inputs, recomputes=self._fsdp is not None and on_gpu),
            fallback=self._estimate if decoder is None else None,
            # Recurrent blocks, of which no two examples can share a sequence.
            may_loop=why_not_packed(inputs.config) is not None,
        )
        if decoder is not None and self._step == "fast":
            self._fast = _fast_plan(inputs, decoder)
        self._base = CUBLAS_WORKSPACE_BYTES if on_gpu else base_bytes

    def on_devices(self, devices: int) -> MemoryPlanner:
        """Return the planner of the same run on so many devices, of as many sequences each."""
        planner = copy.copy(self)
        planner.inputs = replace(self.inputs, devices=devices)
        if self._fast is not None and self.inputs.parallel == "fsdp":
            adapted = as_decoder(_adapted(planner.inputs), "shard")
            planner._fast = _fast_plan(planner.inputs, adapted)
        return planner

    def plan(
        self, micro_batch_size: int | None = None, memory: MemoryConfig | None = None
    ) -> MemoryPlan:
        """Return the plan with these settings in place of the inputs' own."""
        size = self.inputs.micro_batch_size if micro_batch_size is None else micro_batch_size
        return self._plan(size, memory, self._traces.trace)

    def plan_leaner(
        self, planned: MemoryPlan, budget_bytes: int | None = None
    ) -> MemoryPlan | None:
        """Return the fastest plan within `budget_bytes`, or the leanest.

        Without a budget it is one that is clearly leaner than `planned`. None if there is none: in
        another step than the fast one, or after its leanest.
        """
        if self._fast is None or planned.checkpointing is None:
            return None
        evaluation = self.evaluation_bytes(self._fast.batch_size)
        budget = round(LEANER_FRACTION * planned.total) if budget_bytes is None else budget_bytes
        fit = fit_memory(self._fast, "auto", budget, evaluation)
        # Explained without the budget, which is no limit of the user or the device.
        fit = fit_with(self._fast, fit.checkpointing, evaluation)
        leaner = self._planned(self._fast, fit, evaluation)
        return leaner if leaner.total < planned.total else None

    def over_nf4(self) -> MemoryPlanner | None:
        """Return the planner of the same run over a base in nf4; None where that is no choice.

        It is none for a base that is packed already, without LoRA, and for linears that cannot be.
        """
        if not self._nf4_saving or self.inputs.lora is None:
            return None
        inputs = replace(self.inputs, base=BaseWeights("nf4"))
        try:
            check_native_only(inputs.config, base=inputs.base, fsdp=False)
            return MemoryPlanner(inputs, self._base)
        except (ConfigError, ModelError, TargetError):  # odd widths, a linear in modules_to_save
            return None

    def usable_bytes(self, free_bytes: int) -> int:
        """Return how much of the free memory may be planned for: see docs/memory.md."""
        loaded, usable = 0, USABLE_MEMORY_FRACTION
        if self._fast is not None:
            loaded, usable = self._fast.loaded_bytes, self._fast.usable_fraction
        reserved = FRAGMENTED_WEIGHTS_FRACTION * loaded
        if self.inputs.devices > 1 and self.inputs.device_type == "cuda":
            reserved += NCCL_BYTES
        return max(1, round(usable * free_bytes - reserved))

    def largest_micro_batch(self, available_bytes: int, memory: MemoryConfig | None = None) -> int:
        """Return the most sequences that fit into `available_bytes`; 0: not even one.

        What was not traced is estimated from what was, and traced where that decides.
        """
        # Sizes of many tokens, because the loss takes its tokens in chunks: it grows only until the
        # first is full.
        far = max(self.inputs.micro_batch_size, -(-MIN_FAR_TOKENS // self.inputs.tokens))
        for size in (far, 2 * far):
            self.plan(size, memory)

        def fits(size: int) -> bool:
            return self._plan(size, memory, self._traces.estimate).total <= available_bytes

        def really_fits(size: int) -> bool:
            return self.plan(size, memory).total <= available_bytes

        largest, too_large = 0, None
        while too_large is None or too_large - largest > 1:
            size = largest_that_fits(fits, largest, too_large)
            if size == largest:
                size += 1
                # A step takes at least what the line through two smaller ones says.
                if size > self._traces.largest_size and not fits(size):
                    break
            if really_fits(size):
                largest = size
            else:
                too_large = size
        return largest

    def evaluation_bytes(self, micro_batch_size: int) -> int:
        """Return what a validation pass of this many sequences takes."""
        return _evaluation_bytes(self._traces.trace(micro_batch_size, learns=False))

    def _estimate(self, size: int, learns: bool) -> StepMemory:
        return estimate_step(self.inputs, self._counts.trainable, size, learns=learns)

    @property
    def _shards(self) -> int:
        return self.inputs.shards if self.inputs.parallel == "fsdp" else 1

    @property
    def _parallel(self) -> str | None:
        return None if self.inputs.devices == 1 else self.inputs.parallel

    def _plan(self, size: int, memory: MemoryConfig | None, traced: Traced) -> MemoryPlan:
        if self._fast is None:
            plan = self._plan_traced(size, traced)
            if self._fsdp is None:
                return plan
            return plan_fsdp(self.inputs, plan, self._fsdp, size, memory or self.inputs.memory)
        evaluation = _evaluation_bytes(traced(size, learns=False))
        return self._plan_fast(self._fast.resized(size), memory or self.inputs.memory, evaluation)

    def _plan_fast(self, plan: FastPlan, memory: MemoryConfig, evaluation: int) -> MemoryPlan:
        # A validation pass runs beside the buffers, which a graph never gives back.
        gb = memory.memory_gb
        if self.inputs.checkpointing is not None:
            fit = fit_with(plan, self.inputs.checkpointing, evaluation)
        else:
            budget = None if gb is None else round(gb * 1e9)
            fit = fit_memory(plan, memory.memory, budget, evaluation)
        return self._planned(plan, fit, evaluation)

    def _planned(self, plan: FastPlan, fit: MemoryFit, evaluation: int) -> MemoryPlan:
        names = list(MODES)
        leaner = [
            (name, plan.memory(MODES[name]).total + evaluation)
            for name in names[names.index(fit.checkpointing.mode) + 1 :]
        ]
        total = fit.memory.total + evaluation
        parts = {**vars(fit.memory), "other": fit.memory.other + evaluation}
        return MemoryPlan(
            "fast",
            self._counts.trainable,
            self._counts.total,
            **parts,
            checkpointing=fit.checkpointing,
            reason=fit.reason,
            leaner_modes=tuple((name, size) for name, size in leaner if size < total),
            devices=self.inputs.devices,
            parallel=self._parallel,
            nf4_saving=self._nf4_saving // self._shards,
        )

    def _plan_traced(self, size: int, traced: Traced) -> MemoryPlan:
        inputs, held = self.inputs, traced(size)
        if self._base is None:  # after a trace, which has loaded code that the process keeps
            self._base = resident_bytes()
        base = self._base
        trained = self._counts.trainable * 4  # fp32
        gradients, loss = held.gradients, held.loss
        if self._step == "captured":
            # The graph holds its memory pool meanwhile.
            base += _evaluation_bytes(traced(size, learns=False))
        if self._step == "captured" or inputs.micro_batches > 1 or inputs.lora is not None:
            gradients = trained  # of the micro-batches before, or in one flat buffer
        return MemoryPlan(
            step=self._step,
            trained_parameters=self._counts.trainable,
            parameters=self._counts.total,
            weights=self._frozen + trained,
            gradients=gradients,
            optimizer=2 * trained,
            activations=held.activations,
            loss=loss,
            other=base + _slack(inputs, held),
            devices=inputs.devices,
            parallel=self._parallel,
            nf4_saving=self._nf4_saving // self._shards,
        )


def _evaluation_bytes(traced: StepMemory) -> int:
    return traced.activations + traced.loss


def _fast_plan(inputs: PlanInputs, model: Decoder) -> FastPlan:
    """Return the plan of the hand-written step; changes `model`, as FastPlan does."""
    shards = inputs.shards if inputs.parallel == "fsdp" else None
    sizes = inputs.micro_batch_size, inputs.tokens
    return FastPlan(model, *sizes, packed=inputs.packed, shards=shards)


def _adapted(inputs: PlanInputs) -> LanguageModel:
    """Return the model that trains, without values."""
    model = empty_language_model(inputs.config)
    if inputs.lora is None:
        # FSDP2 gathers weights in the compute dtype; else autocast copies them, which is traced.
        if inputs.parallel == "fsdp":
            model = model.to(inputs.compute_dtype)
        return model.requires_grad_(True)
    # Full fine-tuning trains fp32 weights; LoRA's frozen base is stored in the compute dtype.
    if inputs.compute_dtype is torch.bfloat16:
        model = model.bfloat16()
    quantise_empty_model(model, inputs.base, inputs.quantised_weights)
    apply_lora(model, inputs.lora)
    if inputs.embedding_rows:
        # Which rows does not matter, but gradients have to reach the embedding.
        train_token_rows(model, range(min(inputs.embedding_rows, inputs.config.vocab_size)))
    return model


def _describe_model(inputs: PlanInputs, *, recomputes: bool) -> str:
    """Return in words what `_adapted` has built, and whether its blocks are recomputed."""
    kind = inputs.config
    about = repr(kind) if isinstance(kind, DecoderConfig) else f"{kind.source} {kind.logit_scale}"
    trained = f"{inputs.lora} {inputs.embedding_rows}"
    packed = "all" if inputs.quantised_weights is None else sorted(inputs.quantised_weights)
    return f"{about} {trained} {inputs.base} {packed} {inputs.parallel} {recomputes}"


def _frozen_bytes(inputs: PlanInputs, model: LanguageModel, counts: ParameterCounts) -> int:
    """Return the bytes of what does not train, in its storage dtype."""
    if not inputs.base.is_quantised:
        return counts.frozen * _base_dtype(inputs).itemsize
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return sum(t.numel() * t.element_size() for t in (*frozen, *model.buffers()))


def _base_dtype(inputs: PlanInputs) -> torch.dtype:
    """Return the dtype of the weights that stay frozen; what trains is fp32."""
    return torch.float32 if inputs.lora is None else inputs.compute_dtype


def _slack(inputs: PlanInputs, traced: StepMemory) -> int:
    if inputs.device_type == "cuda":  # its peak counts live tensors, not what is cached or split
        return 0
    stored = inputs.base.base_dtype if inputs.base.is_quantised else "auto"
    return round(CPU_SLACK[stored] * (traced.activations + traced.loss))
