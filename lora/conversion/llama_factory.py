"""LLaMA-Factory's configuration files (`llamafactory-cli train FILE`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora.conversion.common_rules import (
    CACHES,
    KERNELS,
    NO_QUANTIZATION,
    NO_TRACKER,
    SHARED,
    batch,
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

INFO_FILE, MAX_INFO_BYTES = "dataset_info.json", 1 << 22
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
        folder = Path(str(keys.get("dataset_dir") or "data"))
        files = [_file_of(name, folder) for name in names]
        if len(files) == 1 and files[0] is not None:
            return Outcome({ours: files[0]}, f"as {folder / INFO_FILE} says, columns included")
        why = f"{ours} is a file: the file_name of {', '.join(names)} in {folder / INFO_FILE}"
        if len(names) > 1:
            why += "; put several into one directory"
        return Outcome(missing={"": why})

    return rule


def _file_of(name: str, folder: Path) -> str | None:
    """Return the file or hub's name that `dataset_info.json` gives for a data set, if it is here.

    It is looked for in `folder`, from where the command runs, as LLaMA-Factory does.
    """
    path = folder / INFO_FILE
    try:
        if path.stat().st_size > MAX_INFO_BYTES:
            return None
        entry = json.loads(path.read_text(encoding="utf-8"))[name]
        found = folder / entry["file_name"] if "file_name" in entry else entry["hf_hub_url"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not here, or not as LLaMA-Factory writes it: then the user names the file
    return str(found)


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


def _epochs(value: Any, keys: Keys) -> Outcome:
    if (number(keys.get("max_steps")) or 0) > 0:
        return Outcome(note="max_steps ends the run first")
    return Outcome({"epochs": str(value)})


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
    "num_train_epochs": _epochs,
    "eval_strategy": _strategy("eval_every_steps"),
    "save_strategy": _strategy("save_every_steps"),
    "pure_bf16": same("precision", {"true": "bf16", "false": "auto"}),
    "quantization_bit": missing(NO_QUANTIZATION),
    "quantization_method": missing(NO_QUANTIZATION),
    "double_quantization": missing(NO_QUANTIZATION),
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
