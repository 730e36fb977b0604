"""`lora plan`: estimate the memory of a run and the largest batch that fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from lora.cli.flags.from_fields import DEVICE, Flat, config_from, flags_from
from lora.cli.flags.shared import BaseFlags, Implementation, Json, LoRAFlags, Model
from lora.config import (
    BaseWeights,
    DataConfig,
    LoRAConfig,
    MemoryConfig,
    MemoryMode,
    Parallel,
    TrainConfig,
)
from lora.errors import ConfigError
from lora.runs.typed_json import json_text
from lora.terminal import build_console, print_note

if TYPE_CHECKING:
    from lora.fast.memory.parallel import ParallelPlan
    from lora.fast.memory.plan import MemoryPlan, PlanInputs
    from lora.fast.memory.planner import MemoryPlanner

MAX_MEMORY_GB = 1e6
MAX_DEVICES = 4096
KINDS = {"lora": "LoRA", "full": "full fine-tuning"}
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "loss": "loss (logits)",
    "other": "process and allocator",
}
STEPS = {"plain": "PyTorch autograd", "captured": "CUDA graph", "fast": "fused GPU step"}

PlanDevice = Annotated[
    Literal["auto", "cpu", "cuda"],
    Parameter(group=DEVICE, help="Device of the run; cuda works without a GPU, with --memory-gb."),
]
PlanDevices = Annotated[
    int,
    Parameter(
        group=DEVICE,
        help="Devices that train together; the plan is of each, with its part of the batch.",
    ),
]
PlanParallel = Annotated[
    Parallel,
    Parameter(
        group=DEVICE,
        help="Weights on several devices: ddp (all on each) or fsdp (sharded); auto: what suits.",
    ),
]


@flags_from(TrainConfig, only=("batch_size", "gradient_accumulation"))
class BatchFlags:
    """Sizes of a step."""


@flags_from(DataConfig, only=("max_length", "packing"))
class SequenceFlags:
    """Sequences of a batch."""


@flags_from(MemoryConfig)
class PlanMemory:
    """GPU memory."""

    memory: MemoryMode = MemoryConfig.memory
    """Activation checkpointing, as in lora finetune; auto names the mode that a run would take."""
    memory_gb: float | None = None
    """Memory of each device, in GB (10⁹ bytes). Default: what is free on this machine."""


def plan(
    *,
    model: Model = None,
    implementation: Implementation = "auto",
    device: PlanDevice = "auto",
    devices: PlanDevices = 1,
    parallel: PlanParallel = "auto",
    json: Json = False,
    sequences: Annotated[SequenceFlags | None, Flat] = None,
    lora: Annotated[LoRAFlags | None, Flat] = None,
    batch: Annotated[BatchFlags | None, Flat] = None,
    memory: Annotated[PlanMemory | None, Flat] = None,
    base: Annotated[BaseFlags | None, Flat] = None,
) -> int:
    """Estimate the memory of LoRA and of full fine-tuning, and the largest batch.

    For example:

        lora plan
        lora plan --model ./llama --device cuda --memory-gb 24 --max-length 2048
        lora plan --model ./llama-70b --device cuda --memory-gb 80 --devices 4
        lora plan --batch-size 32 --gradient-accumulation 4 --json

    Only the model's config.json is read, no weights. lora finetune prints its
    plan too, and at the end the measured peak.
    """
    how_read = config_from(DataConfig, sequences or SequenceFlags())
    train = config_from(TrainConfig, batch or BatchFlags())
    lora_config = config_from(LoRAConfig, lora or LoRAFlags())
    memory_config = config_from(MemoryConfig, memory or PlanMemory())
    base_weights = config_from(BaseWeights, base or BaseFlags())
    _check_memory(memory_config.memory_gb)
    _check_devices(devices)
    import torch

    from lora.device import available_bytes, choose_device
    from lora.distributed.devices import check_batch
    from lora.distributed.world import World
    from lora.fast.memory.plan import PlanInputs
    from lora.pretrained.load.models import implementation_of, model_config
    from lora.pretrained.load.task import (
        check_native_only,
        planned_base,
        settled_packing,
    )
    from lora.pretrained.positions import describe_excess
    from lora.pretrained.sources import find_model

    world = World(size=devices)  # what is planned is its first process
    check_batch(train, world)
    kind = choose_device().device.type if device == "auto" else device
    source = find_model(model)
    code = implementation_of(source.folder, implementation)
    config = model_config(source.folder, code.kind)
    base_weights, quantised = planned_base(source.folder, base_weights)
    check_native_only(config, base=base_weights, fsdp=parallel == "fsdp")
    code.tell_unless_native(print_note)
    compute_dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    how_read = settled_packing(how_read, config, print_note, compute_dtype)
    mode, memory_gb = memory_config.memory, memory_config.memory_gb
    room = available_bytes(kind) if memory_gb is None else round(memory_gb * 1e9)
    if room is not None and memory_gb is None and kind == "cpu":
        room //= devices  # processes of one machine
    inputs = PlanInputs(
        config=config,
        lora=lora_config,
        micro_batch_size=world.share.largest(train.micro_batch_size),
        tokens=how_read.max_length,
        device_type=kind,
        compute_dtype=compute_dtype,
        micro_batches=train.gradient_accumulation,
        packed=how_read.is_packed,
        base=base_weights,
        quantised_weights=quantised,
        devices=devices,
    )
    if excess := describe_excess(inputs.tokens, inputs.config.max_position_embeddings):
        print_note(f"note: {excess}")
    each = {"lora": inputs, "full": replace(inputs, lora=None, base=BaseWeights())}
    planned = {name: _plan_kind(one, parallel, memory_config, room) for name, one in each.items()}
    if json:
        planned_json = _as_json(source.name, inputs, planned, room, mode)
        print(json_text({**planned_json, "implementation": code.kind}))
    else:
        _show(source.name, inputs, planned)
    return 0


def _check_memory(memory_gb: float | None) -> None:
    if memory_gb is not None and memory_gb >= MAX_MEMORY_GB:
        raise ConfigError(
            f"Cannot plan for --memory-gb {memory_gb}. Allowed: a number > 0 and < "
            f"{MAX_MEMORY_GB:g}, in GB (10⁹ bytes)."
        )


def _check_devices(devices: int) -> None:
    if not 1 <= devices <= MAX_DEVICES:
        raise ConfigError(
            f"Cannot plan for --devices {devices}. Allowed: an integer ≥ 1 and ≤ {MAX_DEVICES:,}."
        )


@dataclass(frozen=True)
class _Saving:
    """How activation checkpointing helps."""

    largest: int = 0
    """Sequences that fit in the leanest mode."""
    text: str = ""


@dataclass(frozen=True)
class _Planned:
    """The plan of LoRA or of full fine-tuning."""

    chosen: ParallelPlan
    """Planned as a run would be, for ddp or fsdp."""
    plan: MemoryPlan
    """In the mode that was named; for auto without activation checkpointing."""
    room: int | None
    """What a device may hold, in bytes."""
    largest: int | None
    """Sequences that fit on a device in this mode; None where `room` is not known."""
    saving: _Saving
    over_nf4: MemoryPlan | None = None
    """Of a run that does not fit: its plan over a base in nf4, if it can have one."""


def _plan_kind(
    inputs: PlanInputs, parallel: Parallel, memory: MemoryConfig, free: int | None
) -> _Planned:
    from lora.fast.memory.parallel import plan_parallel

    chosen = plan_parallel(inputs, parallel, memory, free)
    planner, room = chosen.planner, free
    if free and memory.memory_gb is None and inputs.device_type == "cuda":
        # What finetune would plan with: some of what is free is left for fragments.
        room = planner.usable_bytes(free)
    shown = MemoryConfig("none" if memory.memory == "auto" else memory.memory, memory.memory_gb)
    if memory.memory == "auto" and chosen.plan.recomputed_blocks is not None and room is not None:
        shown = MemoryConfig("auto", room / 1e9)  # FSDP2 always recomputes what does not fit
    plan = planner.plan(memory=shown)
    largest = None if room is None else planner.largest_micro_batch(room, shown)
    saving = _savings(planner, plan, room) if memory.memory == "auto" else _Saving()
    over_nf4 = None if room is None or largest else _over_nf4(planner, memory, room)
    return _Planned(chosen, plan, room, largest, saving, over_nf4)


def _over_nf4(planner: MemoryPlanner, memory: MemoryConfig, room: int) -> MemoryPlan | None:
    """Return the plan that a run over nf4 would take in `room`, in the mode that was named."""
    nf4 = planner.over_nf4()
    return None if nf4 is None else nf4.plan(memory=replace(memory, memory_gb=room / 1e9))


def _savings(planner: MemoryPlanner, planned: MemoryPlan, room: int | None) -> _Saving:
    """Return how a run can save memory and the largest batch that then fits, if it can."""
    if room is None or planned.step != "fast":
        return _Saving()
    leanest, auto = MemoryConfig("full+offload"), MemoryConfig("auto", room / 1e9)
    largest = planner.largest_micro_batch(room, leanest)
    text = "not even one sequence with --memory full+offload"
    if largest:
        text = f"up to {_sequences(largest)} with --memory full+offload"
    if planned.total > room:
        text = f"{planner.plan(memory=auto).reason}; {text}"
    return _Saving(largest, text)


def _as_json(
    name: str, inputs: PlanInputs, planned: dict[str, _Planned], room: int | None, mode: MemoryMode
) -> dict[str, Any]:
    ways = {kind: one.saving.text for kind, one in planned.items()}
    return {
        "model": name,
        "device": inputs.device_type,
        "devices": inputs.devices,
        "parallel": {kind: one.chosen.parallel for kind, one in planned.items()},
        "parallel_reason": {kind: one.chosen.reason for kind, one in planned.items()},
        "rows": inputs.micro_batch_size,
        "tokens": inputs.tokens,
        "rank": inputs.lora.rank if inputs.lora else None,
        **{kind: one.plan.to_dict() for kind, one in planned.items()},
        "available_bytes": room,
        "largest_rows": {kind: one.largest for kind, one in planned.items()},
        "ways_to_save": ways if mode == "auto" else {},
        "over_nf4": {
            kind: None if one.over_nf4 is None else one.over_nf4.total
            for kind, one in planned.items()
        },
    }


def _show(name: str, inputs: PlanInputs, planned: dict[str, _Planned]) -> None:
    from rich.table import Table

    console = build_console()
    lora, full = planned["lora"].plan, planned["full"].plan
    rank = inputs.lora.rank if inputs.lora else 0
    size = f"{_sequences(inputs.micro_batch_size)} of {inputs.tokens} tokens"
    table = Table(
        title=f"{name} on {_describe_devices(inputs)}: {size}",
        title_justify="left",
    )
    for head in ("", f"LoRA, rank {rank}", "full fine-tuning"):
        table.add_column(head, justify="right" if head else "left")
    for key, words in PARTS.items():
        table.add_row(words, _gb(getattr(lora, key)), _gb(getattr(full, key)))
    table.add_section()
    table.add_row("total", _gb(lora.total), _gb(full.total), style="bold")
    table.add_row(
        "trained parameters", f"{lora.trained_parameters:,}", f"{full.trained_parameters:,}"
    )
    console.print(table)
    percent = 100 * lora.trained_parameters / lora.parameters
    saved = 100 * (1 - lora.total / full.total)
    console.print(
        f"LoRA trains {percent:.2f}% of {lora.parameters:,} parameters and "
        + (f"saves {saved:.0f}% of the memory." if saved > 0 else "saves no memory here.")
    )
    console.print(f"Training step: LoRA {STEPS[lora.step]}, full {STEPS[full.step]}.")
    if (stored := inputs.base.base_dtype) != "auto":
        console.print(f"full fine-tuning: of the unquantised model; it cannot train {stored}.")
    for kind, words in KINDS.items():
        chosen = planned[kind].chosen
        if chosen.reason:
            mode = f"; {chosen.plan.reason}" if chosen.plan.reason else ""
            console.print(f"{words}: {chosen.reason}{mode}.")
    for kind, words in KINDS.items():
        one = planned[kind]
        if one.room is None:
            console.print("Largest batch: unknown, this machine has no such GPU. Give --memory-gb.")
            return
        console.print(_describe_fit(words, one.largest or 0, one.room, inputs, one.saving))
        if one.saving.text:
            console.print(f"  {one.saving.text}.")
        if one.over_nf4 is not None:
            console.print(f"  {_describe_over_nf4(one.over_nf4, one.room)}.")


def _describe_devices(inputs: PlanInputs) -> str:
    kind, devices = inputs.device_type, inputs.devices
    if devices == 1:
        return kind
    return f"each of {devices} GPUs" if kind == "cuda" else f"{kind}, each of {devices} processes"


def _describe_fit(
    words: str, n_sequences: int, room: int, inputs: PlanInputs, saving: _Saving
) -> str:
    of_tokens = f"of {inputs.tokens} tokens"
    if n_sequences:
        on_each = f" on each device ({n_sequences * inputs.devices} together)"
        return (
            f"{words}: up to {_sequences(n_sequences)} {of_tokens} fit into {_gb(room)}"
            f"{'' if inputs.devices == 1 else on_each}."
        )
    # What changes nothing but the time of a step comes first.
    ways = ["--memory full+offload"] if saving.largest else []
    ways += ["a shorter --max-length"]
    ways += ["more --devices"] if inputs.device_type == "cuda" else []
    ways += ["a smaller model"] + (["LoRA"] if words != "LoRA" else [])
    advice = f"Try {', '.join(ways[:-1])} or {ways[-1]}"
    stored = " without activation checkpointing" if saving.largest else ""
    return f"{words}: not even one sequence {of_tokens} fits into {_gb(room)}{stored}. {advice}."


def _describe_over_nf4(plan: MemoryPlan, room: int) -> str:
    stored = plan.checkpointing
    mode = (
        ""
        if stored is None or stored.mode == "none"
        else f", with activation checkpointing {stored.mode}"
    )
    still = "" if plan.total <= room else ", which does not fit either"
    return f"with --base-dtype nf4 it would take {_gb(plan.total)}{mode}{still}"


def _sequences(count: int) -> str:
    return f"{count} sequence{'' if count == 1 else 's'}"


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"
