"""`lora plan`: estimate the memory of a run and the largest batch that fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from lora.cli.flags.from_fields import DEVICE, Flat, config_from, flags_from
from lora.cli.flags.shared import BaseWeights, Json, LoRAFlags, Model
from lora.config import DataConfig, LoRAConfig, MemoryConfig, MemoryMode, TrainConfig
from lora.errors import ConfigError
from lora.runs.typed_json import json_text
from lora.terminal import build_console, print_note

if TYPE_CHECKING:
    from lora.fast.memory.plan import MemoryPlan, MemoryPlanner, PlanInputs

MAX_MEMORY_GB = 1e6
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
    """Memory that the run may use, in GB (10⁹ bytes). Default: what is free on this machine."""


def plan(
    *,
    model: Model = None,
    device: PlanDevice = "auto",
    base_dtype: BaseWeights = "auto",
    json: Json = False,
    sequences: Annotated[SequenceFlags | None, Flat] = None,
    lora: Annotated[LoRAFlags | None, Flat] = None,
    batch: Annotated[BatchFlags | None, Flat] = None,
    memory: Annotated[PlanMemory | None, Flat] = None,
) -> int:
    """Estimate the memory of LoRA and of full fine-tuning, and the largest batch.

    For example:

        lora plan
        lora plan --model ./llama --device cuda --memory-gb 24 --max-length 2048
        lora plan --batch-size 32 --gradient-accumulation 4 --json

    Only the model's config.json is read, no weights. lora finetune prints its
    plan too, and at the end the measured peak.
    """
    how_read = config_from(DataConfig, sequences or SequenceFlags())
    train = config_from(TrainConfig, batch or BatchFlags())
    lora_config = config_from(LoRAConfig, lora or LoRAFlags())
    memory_config = config_from(MemoryConfig, memory or PlanMemory())
    _check_memory(memory_config.memory_gb)
    import torch

    from lora.decoder.families import decoder_config
    from lora.device import available_bytes, choose_device
    from lora.fast.memory.plan import MemoryPlanner, PlanInputs
    from lora.pretrained.hf_files import read_config
    from lora.pretrained.positions import describe_excess
    from lora.pretrained.sources import find_model

    kind = choose_device().device.type if device == "auto" else device
    source = find_model(model)
    mode, memory_gb = memory_config.memory, memory_config.memory_gb
    room = available_bytes(kind) if memory_gb is None else round(memory_gb * 1e9)
    inputs = PlanInputs(
        config=decoder_config(read_config(source.folder)),
        lora=lora_config,
        micro_batch_size=train.micro_batch_size,
        tokens=how_read.max_length,
        device_type=kind,
        compute_dtype=torch.bfloat16 if kind == "cuda" else torch.float32,
        micro_batches=train.gradient_accumulation,
        packed=how_read.packing,
        memory=MemoryConfig("none" if mode == "auto" else mode, memory_gb),
        fp8=base_dtype == "fp8",
    )
    excess = describe_excess(inputs.tokens, inputs.config.max_position_embeddings)
    if excess:
        print_note(f"note: {excess}")
    of_full = replace(inputs, lora=None, fp8=False)
    planners = {"lora": MemoryPlanner(inputs), "full": MemoryPlanner(of_full)}
    plans = {name: planner.plan() for name, planner in planners.items()}
    rooms = {
        # What finetune would plan with: some of what is free is left for fragments.
        name: planner.usable_bytes(room) if room and memory_gb is None and kind == "cuda" else room
        for name, planner in planners.items()
    }
    fits = {
        name: None if (own := rooms[name]) is None else planner.largest_micro_batch(own)
        for name, planner in planners.items()
    }
    savings = {}
    if mode == "auto":
        savings = {name: _savings(planners[name], plans[name], rooms[name]) for name in planners}
    if json:
        ways = {name: saving.text for name, saving in savings.items()}
        print(json_text(_as_json(source.name, inputs, plans, room, fits, ways)))
    else:
        _show(source.name, inputs, plans, rooms, fits, savings)
    return 0


def _check_memory(memory_gb: float | None) -> None:
    if memory_gb is not None and memory_gb >= MAX_MEMORY_GB:
        raise ConfigError(
            f"Cannot plan for --memory-gb {memory_gb}. Allowed: a number > 0 and < "
            f"{MAX_MEMORY_GB:g}, in GB (10⁹ bytes)."
        )


@dataclass(frozen=True)
class _Saving:
    """How activation checkpointing helps."""

    largest: int = 0
    """Sequences that fit in the leanest mode."""
    text: str = ""


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
    name: str,
    inputs: PlanInputs,
    plans: dict[str, MemoryPlan],
    room: int | None,
    fits: dict[str, int | None],
    savings: dict[str, str],
) -> dict[str, Any]:
    return {
        "model": name,
        "device": inputs.device_type,
        "rows": inputs.micro_batch_size,
        "tokens": inputs.tokens,
        "rank": inputs.lora.rank if inputs.lora else None,
        **{kind: plan.to_dict() for kind, plan in plans.items()},
        "available_bytes": room,
        "largest_rows": fits,
        "ways_to_save": savings,
    }


def _show(
    name: str,
    inputs: PlanInputs,
    plans: dict[str, MemoryPlan],
    rooms: dict[str, int | None],
    fits: dict[str, int | None],
    savings: dict[str, _Saving],
) -> None:
    from rich.table import Table

    console = build_console()
    lora, full = plans["lora"], plans["full"]
    rank = inputs.lora.rank if inputs.lora else 0
    size = f"{_sequences(inputs.micro_batch_size)} of {inputs.tokens} tokens"
    table = Table(
        title=f"{name} on {inputs.device_type}: {size}",
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
    for kind, words in (("lora", "LoRA"), ("full", "full fine-tuning")):
        room, saving = rooms[kind], savings.get(kind, _Saving())
        if room is None:
            console.print("Largest batch: unknown, this machine has no such GPU. Give --memory-gb.")
            return
        console.print(_describe_fit(words, fits[kind] or 0, room, inputs, saving))
        if saving.text:
            console.print(f"  {saving.text}.")


def _describe_fit(
    words: str, n_sequences: int, room: int, inputs: PlanInputs, saving: _Saving
) -> str:
    of_tokens = f"of {inputs.tokens} tokens"
    if n_sequences:
        return f"{words}: up to {_sequences(n_sequences)} {of_tokens} fit into {_gb(room)}."
    # What changes nothing but the time of a step comes first.
    ways = ["--memory full+offload"] if saving.largest else []
    ways += ["a shorter --max-length", "a smaller model"] + (["LoRA"] if words != "LoRA" else [])
    advice = f"Try {', '.join(ways[:-1])} or {ways[-1]}"
    stored = " without activation checkpointing" if saving.largest else ""
    return f"{words}: not even one sequence {of_tokens} fits into {_gb(room)}{stored}. {advice}."


def _sequences(count: int) -> str:
    return f"{count} sequence{'' if count == 1 else 's'}"


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"
