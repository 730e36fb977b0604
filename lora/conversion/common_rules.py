"""Rules for keys that mean the same in several tools: batch sizes, schedules, outputs, devices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from lora.conversion.convert import (
    Keys,
    Outcome,
    Rule,
    is_off,
    is_on,
    missing,
    nothing,
    number,
)
from lora.conversion.quantised import load_in_4bit, load_in_8bit

SHARDING = (
    "parallel: auto shards the weights where they do not fit on each GPU; lora finetune --devices "
    "says how many GPUs train"
)
NO_TENSOR_PARALLEL = (
    "there is no tensor, context or sequence parallelism: several GPUs divide the batch and the "
    "weights (parallel)"
)
ADAMW = "AdamW with fp32 states, betas 0.9 and 0.99"
NO_TRACKER = "TensorBoard is the only tracker (tensorboard: true); each run has a report.html"
KERNELS = "kernels are chosen by the device and the model"
CACHES = "each run tokenizes its data; there is no cache"
_SCHEDULES = ("cosine", "linear", "constant")


def batch(passes: str, rows: str) -> Rule:
    """Return the rule of the keys `rows` (of one pass) and `passes` (of one step)."""

    def rule(value: Any, keys: Keys) -> Outcome:
        n_rows, n_passes = _count(keys.get(rows)), _count(keys.get(passes))
        if n_rows is None or n_passes is None:
            return Outcome(missing={"": "write a whole number as batch_size"})
        size = n_rows * n_passes
        settings = {"batch_size": str(size), **accumulation(n_passes)}
        note = f"batch_size is that of a whole step: {n_rows} x {n_passes} = {size}"
        return Outcome(settings, f"{note}; with several GPUs multiply by their number")

    return rule


def _count(value: Any) -> int | None:
    """Return a whole number ≥ 1; 1 where no value is given, None for any other value."""
    if value in (None, ""):
        return 1
    found = number(value)
    return int(found) if found is not None and found >= 1 and found.is_integer() else None


def accumulation(n_passes: int) -> Mapping[str, str]:
    """Return the setting that splits a step; none for one pass."""
    return {"gradient_accumulation": str(n_passes)} if n_passes > 1 else {}


def schedule(value: Any, keys: Keys) -> Outcome:
    """Rule of the learning-rate schedule's name."""
    name = str(value).lower().rpartition(".")[2]
    found = {
        "constant_with_warmup": "constant",
        "cosine_with_min_lr": "cosine",
        "get_cosine_schedule_with_warmup": "cosine",
    }.get(name, name)
    if found in _SCHEDULES:
        extra = {"warmup_fraction": "0"} if name == "constant" else {}
        return Outcome({"schedule": found, **extra})
    return Outcome(missing={"": f"there is no schedule {name}; cosine, the default, is used"})


def optimizer(value: Any, keys: Keys) -> Outcome:
    """Rule of the optimizer's name."""
    if "adamw" in str(value).lower():
        return Outcome(note=f"the optimizer is {ADAMW}")
    return Outcome(missing={"": f"the optimizer is {ADAMW}; look for a learning rate that fits it"})


def warmup_steps(steps: str) -> Rule:
    """Return the rule of a warm-up in steps, where the key `steps` has their number."""

    def rule(value: Any, keys: Keys) -> Outcome:
        n_warmup, n_steps = number(value), number(keys.get(steps))
        if n_warmup == 0:
            return Outcome({"warmup_fraction": "0"})
        if n_warmup is not None and n_steps is not None and n_steps > 0:
            return Outcome({"warmup_fraction": f"{min(1.0, n_warmup / n_steps):.4g}"})
        why = f"warmup_fraction is a fraction: write {value} / the number of steps (default 0.05)"
        return Outcome(missing={"": why})

    return rule


def epochs(value: Any, keys: Keys) -> Outcome:
    """Rule of the number of epochs, beside max_steps."""
    if (number(keys.get("max_steps")) or 0) > 0:
        return Outcome(note="max_steps ends the run first")
    return Outcome({"epochs": str(value)})


def output_dir(value: Any, keys: Keys) -> Outcome:
    """Rule of the output directory."""
    path = PurePath(str(value))
    if not path.name:
        return Outcome(missing={"": "name has no equivalent in it; write out: and name:"})
    return Outcome({"out": str(path.parent), "name": path.name}, "a run is the directory out/name")


def validation_size(value: Any, keys: Keys) -> Outcome:
    """Rule of a part of the data that is split off: a fraction, or a number of examples."""
    size = number(value)
    if size is None or size < 0:
        return Outcome(missing={"": "eval_fraction is a number from 0 to 1"})
    if size < 1:
        note = "" if size == 0 else "at most max_eval_examples (200) are split off"
        return Outcome({"eval_fraction": str(value)}, note)
    why = f"eval_fraction is a fraction: write {value} / the number of examples"
    return Outcome(missing={"": why})


def every(ours: str, steps: str) -> Rule:
    """Return the rule of an interval in steps, or as a fraction of the steps."""

    def rule(value: Any, keys: Keys) -> Outcome:
        interval, n_steps = number(value), number(keys.get(steps))
        if interval is not None and interval >= 1:
            return Outcome({ours: str(int(interval))})
        if interval and n_steps:
            return Outcome({ours: str(max(1, int(interval * n_steps)))})
        return Outcome(missing={"": f"{ours} is a number of steps (default: ten in a run)"})

    return rule


def per_epoch(ours: str) -> Rule:
    """Return the rule of a number of times in an epoch."""
    return missing(
        f"{ours} is a number of steps: write those of an epoch / this (default: ten in a run)"
    )


def checkpointing(value: Any, keys: Keys) -> Outcome:
    """Rule of activation checkpointing."""
    if is_off(value):
        return Outcome({"memory": "none"})
    return Outcome(
        {"memory": "auto"}, "activations are recomputed if memory needs it, and only then"
    )


def bf16(value: Any, keys: Keys) -> Outcome:
    """Rule of the switch bf16, beside fp16."""
    if str(value).lower() == "auto":
        return Outcome({"precision": "auto"})
    if is_on(value) or str(value).lower() == "full":
        return Outcome({"precision": "bf16"})
    return Outcome(note="off") if is_on(keys.get("fp16")) else Outcome({"precision": "fp32"})


def fp16(value: Any, keys: Keys) -> Outcome:
    """Rule of the switch fp16."""
    if is_off(value) or str(value).lower() == "auto":
        return Outcome(note="off there and here")
    return Outcome(missing={"": "there is no fp16 training; precision: auto takes bf16 or fp32"})


def remote_code(value: Any, keys: Keys) -> Outcome:
    """Rule of trust_remote_code."""
    if is_off(value):
        return Outcome(note="off there and here")
    return Outcome(missing={"": "no code of a model's repository is run; its family must be known"})


def words(value: Any) -> list[str]:
    """Return a list of names, or names separated by commas, as a list."""
    items = value if isinstance(value, list) else str(value).split(",")
    return [str(item).strip() for item in items if str(item).strip()]


SHARED: dict[str, Rule] = {
    "trust_remote_code": remote_code,
    "bf16": bf16,
    "fp16": fp16,
    "tf32": nothing("fp32 matmuls stay fp32; bf16 is the fast dtype"),
    "gradient_checkpointing": checkpointing,
    "gradient_checkpointing_kwargs": nothing("how is chosen by memory"),
    "optim": optimizer,
    "optimizer": optimizer,
    "lr_scheduler": schedule,
    "lr_scheduler_type": schedule,
    "warmup_steps": warmup_steps("max_steps"),
    "output_dir": output_dir,
    "eval_steps": every("eval_every_steps", "max_steps"),
    "save_steps": every("save_every_steps", "max_steps"),
    "logging_steps": nothing("every step is in metrics.jsonl"),
    "logging_dir": nothing("logs are in the run directory"),
    "save_safetensors": nothing("safetensors is the only format"),
    "dataloader_num_workers": nothing("batches are prepared in the background"),
    "dataloader_pin_memory": nothing("batches are prepared in the background"),
    "dataloader_prefetch_factor": nothing("batches are prepared in the background"),
    "remove_unused_columns": nothing("lora data lists the columns that are not used"),
    "group_by_length": nothing("short examples are packed, or padded no further than needed"),
    "ddp_timeout": nothing("the environment variable LORALM_MAX_WAIT_S limits what processes wait"),
    "deepspeed": nothing(SHARDING),
    "fsdp": nothing(SHARDING),
    "fsdp_config": nothing(SHARDING),
    "hub_model_id": missing("nothing is uploaded; upload the directory adapter/ yourself"),
    "push_to_hub": missing("nothing is uploaded; upload the directory adapter/ yourself"),
    "load_in_8bit": load_in_8bit,
    "load_in_4bit": load_in_4bit,
    "adam_beta1": nothing(f"the optimizer is {ADAMW}"),
    "adam_beta2": missing(f"the optimizer is {ADAMW}"),
    "adam_epsilon": missing(f"the optimizer is {ADAMW}"),
    "resume_from_checkpoint": missing("lora finetune --resume --name X continues the run X"),
    "neftune_noise_alpha": missing("there is no NEFTune here"),
}
"""Keys that axolotl and LLaMA-Factory share, mostly those of transformers' TrainingArguments."""
