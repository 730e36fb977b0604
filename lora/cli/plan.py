"""`lora plan`: what a run would hold in memory, and which batch fits."""

from __future__ import annotations

import json as json_format
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from lora.config import BaseDtype, LoRAConfig, MemoryConfig, MemoryMode, TrainConfig
from lora.errors import ConfigError

if TYPE_CHECKING:
    from lora.fast.memory.plan import MemoryPlan, PlanInputs

PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "loss": "loss (logits)",
    "other": "process and allocator",
}


def plan(
    *,
    model: str | None = None,
    batch_size: int = 8,
    micro_batches: int = 1,
    max_length: int = 512,
    packing: bool = True,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    memory: MemoryMode = "auto",
    memory_gb: float | None = None,
    base_dtype: BaseDtype = "auto",
    json: bool = False,
    lora: Annotated[LoRAConfig | None, Parameter(name="*")] = None,
) -> int:
    """Show what LoRA and full fine-tuning would hold in memory, and which batch fits.

    Examples:

        lora plan
        lora plan --model ./llama --device cuda --memory-gb 24 --max-length 2048 --rank 16
        lora plan --batch-size 32 --micro-batches 4 --json

    No weights are loaded; the model's config.json is enough. A run shows its plan as well, and at
    its end what was measured.

    Parameters
    ----------
    model
        A folder in Hugging Face's layout, a .gguf file or a hub's owner/name; left out, it is
        SmolLM2-135M-Instruct.
    batch_size
        Rows of one optimizer step.
    micro_batches
        Parts that a step's rows are split into.
    max_length
        Tokens of a row.
    packing
        Rows hold several examples.
    device
        Where the run would be; a GPU can be planned for where there is none.
    memory
        How the fast step of a GPU saves memory, as in `lora finetune`; auto shows the fastest
        (none), and which one a run would take if that does not fit.
    memory_gb
        What the run may hold, in GB (10⁹ bytes); left out, what this machine has free.
    base_dtype
        How LoRA's frozen linears are kept: auto in the products' type, fp8 in eight bits.
    json
        Print the plan as one JSON object.
    """
    import torch

    from lora.decoder.families import decoder_config
    from lora.device import available_bytes, choose_device
    from lora.fast.memory.fast_step import USABLE_MEMORY_FRACTION
    from lora.fast.memory.plan import PlanInputs, plan_memory
    from lora.pretrained.hf_files import read_config
    from lora.pretrained.sources import find_model

    _check(batch_size, micro_batches, max_length, memory_gb)
    kind = choose_device().device.type if device == "auto" else device
    source = find_model(model)
    train = TrainConfig(batch_size=batch_size, micro_batches=micro_batches)
    room = available_bytes(kind) if memory_gb is None else round(memory_gb * 1e9)
    room_gb = (
        None if room is None else room / 1e9 * (USABLE_MEMORY_FRACTION if memory_gb is None else 1)
    )
    setting = PlanInputs(
        config=decoder_config(read_config(source.folder)),
        lora=lora or LoRAConfig(),
        micro_batch_size=train.micro_batch_size,
        tokens=max_length,
        device_type=kind,
        compute_dtype=torch.bfloat16 if kind == "cuda" else torch.float32,
        micro_batches=train.micro_batches,
        packed=packing,
        memory=MemoryConfig("none" if memory == "auto" else memory, room_gb),
        fp8=base_dtype == "fp8",
    )
    of_full = replace(setting, lora=None, fp8=False)
    settings = {"lora": setting, "full": of_full}
    plans = {name: plan_memory(each) for name, each in settings.items()}
    fits = {name: _fit(each, room) for name, each in settings.items()}
    ways = {}
    if memory == "auto":
        ways = {name: _way(settings[name], plans[name], room) for name in settings}
    if json:
        print(json_format.dumps(_as_json(source.name, setting, plans, room, fits, ways)))
    else:
        _show(source.name, setting, plans, room, fits, ways)
    return 0


def _check(batch_size: int, micro_batches: int, max_length: int, memory_gb: float | None) -> None:
    if batch_size < 1 or micro_batches < 1 or batch_size % micro_batches:
        raise ConfigError(
            f"--batch-size {batch_size} --micro-batches {micro_batches}: allowed are counts ≥ 1, "
            "and micro_batches must divide batch_size."
        )
    if max_length < 2:
        raise ConfigError(f"--max-length {max_length}: allowed are rows of at least 2 tokens.")
    if memory_gb is not None and not 0 < memory_gb < 1e6:
        raise ConfigError(f"--memory-gb {memory_gb}: allowed is a number > 0, in GB (10⁹ bytes).")


def _fit(setting: PlanInputs, room: int | None) -> int | None:
    from lora.fast.memory.plan import largest_micro_batch

    return None if room is None else largest_micro_batch(setting, room)


def _way(setting: PlanInputs, planned: MemoryPlan, room: int | None) -> str:
    """Return how a run would save memory, and how many rows would fit at most; "" if it cannot."""
    if room is None or planned.step != "fast":
        return ""
    from lora.fast.memory.plan import plan_memory

    gb = setting.memory.memory_gb
    least = _fit(replace(setting, memory=MemoryConfig("full+offload", gb)), room) or 0
    text = f"with --memory full+offload up to {least} rows"
    if planned.total > room:
        text = f"{plan_memory(replace(setting, memory=MemoryConfig('auto', gb))).reason}; {text}"
    return text


def _as_json(
    name: str,
    setting: PlanInputs,
    plans: dict[str, MemoryPlan],
    room: int | None,
    fits: dict[str, int | None],
    ways: dict[str, str],
) -> dict[str, Any]:
    return {
        "model": name,
        "device": setting.device_type,
        "rows": setting.micro_batch_size,
        "tokens": setting.tokens,
        "rank": setting.lora.rank if setting.lora else None,
        **{kind: plan.to_dict() for kind, plan in plans.items()},
        "available_bytes": room,
        "largest_rows": fits,
        "ways_to_save": ways,
    }


def _show(
    name: str,
    setting: PlanInputs,
    plans: dict[str, MemoryPlan],
    room: int | None,
    fits: dict[str, int | None],
    ways: dict[str, str],
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    lora, full = plans["lora"], plans["full"]
    rank = setting.lora.rank if setting.lora else 0
    size = f"{setting.micro_batch_size} rows of {setting.tokens} tokens"
    table = Table(
        title=f"{name} on {setting.device_type}: {size}",
        title_justify="left",
    )
    for head in ("", f"LoRA, rank {rank}", "full fine-tuning"):
        table.add_column(head, justify="right" if head else "left")
    for key, words in PARTS.items():
        table.add_row(words, _gb(getattr(lora, key)), _gb(getattr(full, key)))
    table.add_section()
    table.add_row("together", _gb(lora.total), _gb(full.total), style="bold")
    table.add_row("trained", f"{lora.trained_parameters:,}", f"{full.trained_parameters:,}")
    console.print(table)
    share = 100 * lora.trained_parameters / lora.parameters
    saved = 100 * (1 - lora.total / full.total)
    console.print(
        f"LoRA trains {share:.2f} % of {lora.parameters:,} parameters and "
        + (f"saves {saved:.0f} % of the memory." if saved > 0 else "saves no memory here.")
    )
    console.print(f"Planned steps: LoRA {lora.step}, full {full.step}.")
    if room is None:
        console.print("What fits: unknown here, for there is no such GPU. Give --memory-gb.")
        return
    for kind, words in (("lora", "LoRA"), ("full", "full fine-tuning")):
        console.print(_say_fit(words, fits[kind] or 0, room, setting))
        if ways.get(kind):
            console.print(f"  {ways[kind]}.")


def _say_fit(words: str, rows: int, room: int, setting: PlanInputs) -> str:
    if rows:
        return f"{words}: up to {rows} rows of {setting.tokens} tokens fit into {_gb(room)}."
    advice = "shorten --max-length, take a smaller model"
    if words != "LoRA":
        advice += ", or use LoRA"
    return f"{words}: not one row of {setting.tokens} tokens fits into {_gb(room)}; {advice}."


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"
