"""torchtune's configuration files (`tune run … --config FILE`), with components for each part."""

from __future__ import annotations

from typing import Any

from lora.conversion.common_rules import (
    KERNELS,
    NO_TRACKER,
    SHARED,
    batch,
    checkpointing,
    optimizer,
    output_dir,
    schedule,
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
from lora.conversion.quantised import quantize_base

_HUB_DATA = {
    "alpaca_dataset": "tatsu-lab/alpaca",
    "alpaca_cleaned_dataset": "yahma/alpaca-cleaned",
    "samsum_dataset": "Samsung/samsum",
    "grammar_dataset": "liweili/c4_200m",
    "slimorca_dataset": "Open-Orca/SlimOrca-Dedup",
}
"""The data sets that a builder loads where the file names no source."""
_TARGETS = "model.lora_attn_modules"


def _model(value: Any, keys: Keys) -> Outcome:
    name = str(value).rpartition(".")[2]
    if name.startswith("qlora_"):
        return quantize_base("true", keys)
    if name.startswith("lora_"):
        return Outcome(note="LoRA is what trains; the model is checkpointer.checkpoint_dir")
    if name.startswith("dora_"):
        return Outcome(missing={"": f"{name}: there is no DoRA here"})
    return Outcome({"full": "true"}, "the model is checkpointer.checkpoint_dir")


def _targets(value: Any, keys: Keys) -> Outcome:
    names = ["o_proj" if name == "output_proj" else name for name in words(keys.get(_TARGETS, []))]
    if is_on(keys.get("model.apply_lora_to_mlp")):
        names += ["gate_proj", "up_proj", "down_proj"]
    return Outcome({"targets": list(dict.fromkeys(names))} if names else {})


def _dataset(ours: str, part: str) -> Rule:
    def rule(value: Any, keys: Keys) -> Outcome:
        source = keys.get(f"{part}.source")
        files = keys.get(f"{part}.data_files")
        builder = str(keys.get(f"{part}._component_")).rpartition(".")[2]
        files = files[0] if isinstance(files, list) and len(files) == 1 else files
        if isinstance(files, str):
            return Outcome({ours: files})
        found = source if isinstance(source, str) else _HUB_DATA.get(builder)
        if found is not None and found not in ("json", "csv", "parquet", "text"):
            return Outcome({ours: found})
        return Outcome(missing={"": f"{ours} is a file, a directory or owner/name"})

    return rule


def _max_length(value: Any, keys: Keys) -> Outcome:
    if number(value) is None:
        why = "max_length cuts examples at 512 tokens by default: write the longest you need"
        return Outcome(missing={"": why})
    return Outcome({"max_length": value})


def _split(value: Any, keys: Keys) -> Outcome:
    if value == "train":
        return Outcome(note="the training split")
    return Outcome(missing={"": "name a file with these examples"})


def _column(value: Any, keys: Keys) -> Outcome:
    prefix = "dataset.column_map."
    names = {key.removeprefix(prefix): v for key, v in keys.items() if key.startswith(prefix)}
    parts = {"input": "instruction", "output": "output"}
    if "instruct" in str(keys.get("dataset._component_")) and names.keys() <= parts.keys():
        return Outcome({"columns": {parts[name]: str(column) for name, column in names.items()}})
    if names.keys() <= {"instruction", "input", "output", "text"}:
        return Outcome({"columns": {name: str(column) for name, column in names.items()}})
    return Outcome(missing={"": "name the column in columns: or template:"})


def _loss(value: Any, keys: Keys) -> Outcome:
    name = str(value).rpartition(".")[2]
    if name.startswith(("CE", "CrossEntropy", "LinearCrossEntropy", "ForwardKL")):
        return Outcome(note="cross-entropy, in chunks of the vocabulary")
    return refused("its loss is not that of supervised fine-tuning")(value, keys)


def _logger(value: Any, keys: Keys) -> Outcome:
    name = str(value).rpartition(".")[2]
    if name == "TensorBoardLogger":
        return Outcome({"tensorboard": "true"})
    if name in ("DiskLogger", "StdoutLogger"):
        return Outcome(note="every step is in metrics.jsonl")
    return Outcome(missing={"": f"{name}: {NO_TRACKER}"})


def _precision(value: Any, keys: Keys) -> Outcome:
    if value in ("bf16", "fp32"):
        return Outcome({"precision": value})
    return Outcome(missing={"": "precision is auto, bf16 or fp32"})


def _profiler(value: Any, keys: Keys) -> Outcome:
    if is_on(keys.get("profiler.enabled")):
        return Outcome(
            missing={"": "there is no profiler; timings.jsonl has the time of each step"}
        )
    return Outcome(note="off")


def _shuffle(value: Any, keys: Keys) -> Outcome:
    return Outcome(
        note="examples are shuffled by seed",
        missing={"": "examples are shuffled by seed"} if is_off(value) else {},
    )


def _resume(value: Any, keys: Keys) -> Outcome:
    return SHARED["resume_from_checkpoint"](value, keys)


_FILES = nothing("checkpoint_dir is a directory in Hugging Face's layout")
_RULES: dict[str, Rule] = {
    **{key: SHARED[key] for key in ("resume_from_checkpoint", "trust_remote_code")},
    "model._component_": _model,
    **dict.fromkeys((_TARGETS, "model.apply_lora_to_mlp"), _targets),
    "model.apply_lora_to_output": missing("the output head gets no LoRA; see modules_to_save"),
    "model.lora_rank": same("rank"),
    "model.lora_alpha": same("alpha"),
    "model.lora_dropout": same("dropout"),
    "model.use_dora": missing("there is no DoRA here"),
    "model.quantize_base": quantize_base,
    "tokenizer.max_seq_len": _max_length,
    "tokenizer.prompt_template": missing("the model's own chat template is used"),
    "checkpointer.checkpoint_dir": same("model"),
    "checkpointer.adapter_checkpoint": missing(
        "from_adapter continues an adapter of PEFT's format"
    ),
    "dataset": missing("data is one file or directory: put the files into one directory"),
    "dataset.packed": same("packing"),
    "dataset.split": _split,
    "dataset.train_on_input": same("learn_on", {"true": "all", "false": "assistant"}),
    "dataset.new_system_prompt": missing("put it into the column system of each row"),
    "dataset.conversation_column": nothing("messages and conversations are read"),
    "dataset.conversation_style": nothing("messages and ShareGPT's form are read"),
    "dataset_val.split": _split,
    "run_val_every_n_steps": same("eval_every_steps"),
    "seed": same("seed"),
    "shuffle": _shuffle,
    "batch_size": batch("gradient_accumulation_steps", "batch_size"),
    "gradient_accumulation_steps": batch("gradient_accumulation_steps", "batch_size"),
    "epochs": same("epochs"),
    "max_steps_per_epoch": missing("steps is the number of all steps"),
    "optimizer._component_": optimizer,
    "optimizer.fused": nothing("the update is fused"),
    "optimizer.lr": same("learning_rate"),
    "optimizer.weight_decay": same("weight_decay"),
    "optimizer_in_bwd": nothing("memory is planned; lora plan tells it"),
    "lr_scheduler._component_": schedule,
    "lr_scheduler.num_warmup_steps": missing(
        "warmup_fraction is a fraction: write this / the number of steps (default 0.05)"
    ),
    "loss._component_": _loss,
    "clip_grad_norm": same("max_grad_norm"),
    "compile": nothing(KERNELS),
    "output_dir": output_dir,
    "metric_logger._component_": _logger,
    "log_every_n_steps": nothing("every step is in metrics.jsonl"),
    "log_peak_memory_stats": nothing("peak memory is recorded"),
    "log_level": nothing("messages are short"),
    "device": same("device"),
    "dtype": _precision,
    "enable_activation_checkpointing": checkpointing,
    "enable_activation_offloading": same(
        "memory", {"true": "auto", "false": "auto"}, "activations are offloaded if memory needs it"
    ),
    "save_adapter_weights_only": nothing("adapter/ holds the adapter only"),
}
_PREFIXES: dict[str, Rule] = {
    "checkpointer.": _FILES,
    "tokenizer.": nothing("the model's directory has its tokenizer"),
    "profiler.": _profiler,
    "metric_logger.": nothing("logs are in the run directory"),
    "loss.": nothing("cross-entropy, in chunks of the vocabulary"),
    "dataset.column_map.": _column,
    "dataset._component_": _dataset("data", "dataset"),
    "dataset.source": _dataset("data", "dataset"),
    "dataset.data_files": _dataset("data", "dataset"),
    "dataset_val._component_": _dataset("eval_data", "dataset_val"),
    "dataset_val.source": _dataset("eval_data", "dataset_val"),
    "dataset_val.data_files": _dataset("eval_data", "dataset_val"),
}
TORCHTUNE = Tool(
    "torchtune",
    frozenset(
        (
            "_component_",
            "checkpointer",
            "checkpoint_dir",
            "metric_logger",
            "lora_attn_modules",
            "enable_activation_checkpointing",
            "max_steps_per_epoch",
            "apply_lora_to_mlp",
        )
    ),
    _RULES,
    _PREFIXES,
    defaults={
        "dataset.packed": "false",
        "batch_size": "1",
        "epochs": "1",
        "lr_scheduler._component_": "constant",
        "min_lr_rate": "0",
        "optimizer.weight_decay": "0.01",
        "clip_grad_norm": "0",
        "tokenizer.max_seq_len": "no limit",
    },
    is_nested=True,
)
"""Defaults: torchtune's recipes of 2025."""


def without_interpolation(keys: Keys) -> dict[str, Any]:
    """Return the keys with `${name}` replaced by the file's own top-level text `name`."""

    def replace(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replace(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [replace(inner) for inner in value]
        for name, text in keys.items():
            if isinstance(value, str) and isinstance(text, str) and text != value:
                value = value.replace(f"${{{name}}}", text)
        return value

    return {key: replace(value) for key, value in keys.items()}
