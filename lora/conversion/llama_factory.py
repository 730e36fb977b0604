"""LLaMA-Factory's configuration files (`llamafactory-cli train FILE`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora.conversion.common_rules import (
    CACHES,
    KERNELS,
    NO_TRACKER,
    SHARED,
    batch,
    epochs,
    validation_size,
    words,
)
from lora.conversion.convert import (
    Keys,
    Outcome,
    Rule,
    Tool,
    is_off,
    is_on,
    missing,
    nothing,
    number,
    refused,
    same,
)
from lora.conversion.quantised import bits, bits_double, bits_method, bits_type
from lora.data.sources.dataset_info import INFO_FILE, PARTS, read_info

_OF_HUB = {"hf_hub_url", "ms_hub_url", "om_hub_url", "subset", "split", "columns", "formatting"}
"""What of an entry of `dataset_info.json` is used, or needs nothing, for a data set of the hub."""
_EVALUATES = "after training: lora eval DATA --adapter ADAPTER --predictions FILE"


def _stage(value: Any, keys: Keys) -> Outcome:
    if value == "sft":
        return Outcome(note="supervised fine-tuning is what there is")
    if value == "pt":
        return Outcome({"learn_on": "all"}, "every token is learned")
    return refused("its stage is no supervised fine-tuning")(value, keys)


def _finetuning_type(value: Any, keys: Keys) -> Outcome:
    if value == "lora":
        return Outcome(note="LoRA is what trains")
    if value == "full":
        return Outcome({"full": "true"})
    return Outcome(missing={"": "LoRA and full fine-tuning are what there is"})


def _target(value: Any, keys: Keys) -> Outcome:
    return Outcome({"targets": "all-linear" if value == "all" else words(value)})


def _alpha(value: Any, keys: Keys) -> Outcome:
    if value == "twice the rank":
        return Outcome({"alpha": f"{2 * (number(keys.get('lora_rank')) or 8):g}"})
    return Outcome({"alpha": value})


def _dataset(ours: str) -> Rule:
    def rule(value: Any, keys: Keys) -> Outcome:
        names = words(value)
        path = Path(str(keys.get("dataset_dir") or "data")) / INFO_FILE
        entry = read_info(path).get(names[0]) if len(names) == 1 else None
        if isinstance(entry, dict) and isinstance(entry.get("file_name"), str):
            file = str(path.parent / entry["file_name"])
            return Outcome({ours: file}, f"as {path} says, columns included")
        if isinstance(entry, dict) and isinstance(entry.get("hf_hub_url"), str):
            return _hub_dataset(entry, ours)
        why = f"{ours} is a file: the file_name of {', '.join(names)} in {path}"
        if len(names) > 1:
            why += "; put several into one directory"
        return Outcome(missing={"": why})

    return rule


def _hub_dataset(entry: dict[str, Any], ours: str) -> Outcome:
    """Return what an entry of `dataset_info.json` for a data set of the hub becomes.

    The file is read beside data only, so its columns become settings.
    """
    subset, split = entry.get("subset"), entry.get("split", "train")
    is_usual = ours == "data" and not subset and split == "train"
    parts = [entry["hf_hub_url"], *([] if is_usual else [subset, split])]
    settings: dict[str, Any] = {ours: ":".join(str(part) for part in parts if part)}
    lost = {
        f": {key} in {INFO_FILE}": "is read for files only: download the data, and name the file"
        for key in sorted(entry.keys() - _OF_HUB)
        if not is_off(entry[key])
    }
    given = entry.get("columns")
    named: dict[str, Any] = given if isinstance(given, dict) else {}
    columns = {PARTS[part]: str(named[part]) for part in named if part in PARTS}
    columns = {part: column for part, column in columns.items() if part != column}
    lost |= {
        f": columns.{part} in {INFO_FILE}": "has no equivalent here"
        for part in named.keys() - PARTS
    }
    if columns and ours == "data":
        settings["columns"] = columns
    elif columns:
        lost[f": columns in {INFO_FILE}"] = "columns are those of the training data"
    return Outcome(settings, missing=lost)


def _template(value: Any, keys: Keys) -> Outcome:
    why = f"the model's own chat template is used; look with lora data whether it is {value}"
    return Outcome(missing={"": f"{why}, or give a file with chat_template"})


def _packing(value: Any, keys: Keys) -> Outcome:
    if is_on(keys.get("neat_packing")):
        return Outcome({"packing": "true"})
    note = "attention stays within each example" if is_on(value) else ""
    return Outcome({"packing": "true" if is_on(value) else "false"}, note)


def _mask_history(value: Any, keys: Keys) -> Outcome:
    if is_off(value):
        return Outcome(note="off there and here")
    why = 'every assistant turn is learned: mark the earlier ones in the data with "train": false'
    return Outcome(missing={"": why})


def _report_to(value: Any, keys: Keys) -> Outcome:
    names = words(value)
    lost = {f": {n}": NO_TRACKER for n in names if n not in ("none", "tensorboard", "all")}
    settings = {"tensorboard": "true"} if set(names) & {"tensorboard", "all"} else {}
    return Outcome(settings, "" if settings or lost else "no tracker", lost)


def _strategy(ours: str) -> Rule:
    def rule(value: Any, keys: Keys) -> Outcome:
        if value == "steps":
            return Outcome(note=f"{ours} says how often")
        return Outcome(missing={"": f"{ours} is a number of steps (default: ten in a run)"})

    return rule


def _kept(value: Any, keys: Keys) -> Outcome:
    if is_off(value):
        return Outcome(note="a run directory is never replaced")
    return Outcome(missing={"": "a run directory is never replaced: give another name"})


_RULES: dict[str, Rule] = {
    **SHARED,
    "model_name_or_path": same("model"),
    "adapter_name_or_path": same("from_adapter"),
    "stage": _stage,
    "do_train": nothing("lora finetune trains"),
    "do_eval": nothing("validation data are evaluated"),
    "do_predict": missing(_EVALUATES),
    "predict_with_generate": missing(_EVALUATES),
    "finetuning_type": _finetuning_type,
    "lora_target": _target,
    "lora_alpha": _alpha,
    "additional_target": same("modules_to_save"),
    "create_new_adapter": missing("from_adapter continues an adapter; merge it to train another"),
    "loraplus_lr_ratio": missing("A and B have one learning rate"),
    "pissa_init": missing("A is Kaiming-uniform and B zero, as PEFT's default"),
    "dataset": _dataset("data"),
    "eval_dataset": _dataset("eval_data"),
    "dataset_dir": nothing("see dataset"),
    "media_dir": nothing("there are texts only"),
    "template": _template,
    "tool_format": _template,
    "enable_thinking": missing("the chat template decides"),
    "cutoff_len": same("max_length"),
    "packing": _packing,
    "neat_packing": _packing,
    "mask_history": _mask_history,
    "val_size": validation_size,
    "overwrite_cache": nothing(CACHES),
    "preprocessing_num_workers": nothing(CACHES),
    "preprocessing_batch_size": nothing(CACHES),
    "tokenized_path": missing(CACHES),
    "streaming": missing("data are read before training"),
    "overwrite_output_dir": _kept,
    "plot_loss": nothing("report.html has the loss curves"),
    "save_only_model": nothing("checkpoints hold what a resume needs; adapter/ holds the weights"),
    "report_to": _report_to,
    "per_device_train_batch_size": batch(
        "gradient_accumulation_steps", "per_device_train_batch_size"
    ),
    "gradient_accumulation_steps": batch(
        "gradient_accumulation_steps", "per_device_train_batch_size"
    ),
    "per_device_eval_batch_size": nothing("evaluation takes the sequences of one pass"),
    "num_train_epochs": epochs,
    "eval_strategy": _strategy("eval_every_steps"),
    "save_strategy": _strategy("save_every_steps"),
    "pure_bf16": same("precision", {"true": "bf16", "false": "auto"}),
    "quantization_bit": bits,
    "quantization_method": bits_method,
    "quantization_type": bits_type,
    "double_quantization": bits_double,
    "quantization_device_map": nothing("a process has one device, and its weights are there"),
    "upcast_layernorm": nothing("norms are computed in fp32"),
    "rope_scaling": missing("the model's configuration says it"),
    "resize_vocab": nothing("new rows come with special_tokens"),
    "enable_liger_kernel": nothing(KERNELS),
    "use_unsloth": nothing(KERNELS),
    "use_unsloth_gc": nothing(KERNELS),
    "flash_attn": nothing(KERNELS),
    "disable_gradient_checkpointing": same("memory", {"true": "none", "false": "auto"}),
    "pref_beta": refused("it is preference training"),
    "pref_loss": refused("it is preference training"),
}
LLAMA_FACTORY = Tool(
    "LLaMA-Factory",
    frozenset(
        (
            "finetuning_type",
            "stage",
            "template",
            "cutoff_len",
            "lora_rank",
            "lora_target",
            "dataset_dir",
            "val_size",
            "do_train",
            "model_name_or_path",
            "plot_loss",
            "overwrite_output_dir",
            "quantization_bit",
            "per_device_train_batch_size",
        )
    ),
    _RULES,
    {"wandb_": missing(NO_TRACKER), "swanlab_": missing(NO_TRACKER), "fsdp": SHARED["fsdp"]},
    defaults={
        "lora_rank": "8",
        "lora_alpha": "twice the rank",
        "lora_dropout": "0",
        "lora_target": "all",
        "cutoff_len": "2048",
        "packing": "false",
        "val_size": "0",
        "per_device_train_batch_size": "8",
        "learning_rate": "5e-5",
        "num_train_epochs|max_steps": "3",
        "lr_scheduler_type": "linear",
        "warmup_steps|warmup_ratio": "0",
        "min_lr_rate": "0",
        "seed": "42",
    },
)
"""Defaults: llamafactory.hparams and transformers' TrainingArguments, versions of 2026."""
