"""axolotl's configuration files (a YAML file of top-level keys, with a list `datasets`)."""

from __future__ import annotations

import re
from typing import Any

from lora.conversion.common_rules import (
    CACHES,
    KERNELS,
    NO_TENSOR_PARALLEL,
    NO_TRACKER,
    SHARDING,
    SHARED,
    batch,
    epochs,
    per_epoch,
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
    refused,
    same,
)
from lora.conversion.quantised import axolotl_double, axolotl_kwargs, axolotl_peft, gptq, nf4

_READ_TYPES = ("alpaca", "chat_template", "completion", "sharegpt", "input_output", "oasst")
_LOADERS = ("json", "csv", "parquet", "text", "arrow")
"""Names in `path` that say how `data_files` are read."""
_FILES = "the model's own files say it"
_COLUMNS = "give template: with the columns of the data, as in lora finetune --template"
_TURNS = "the assistant's turns are learned, with the token that ends them"
_PARTS = {
    "field": "text",
    "field_messages": "messages",
    "field_tools": "tools",
    "field_system": "system",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
}
"""Parts of an example by the key that names their column."""
_TURN_KEYS = ("message_field_role", "message_field_content", "message_property_mappings")


def _datasets(ours: str) -> Rule:
    def rule(value: Any, keys: Keys) -> Outcome:
        described = _entries(value)
        lost = {
            f"[{number}].{key}": why
            for number, entry in enumerate(described)
            for key, why in _lost_of_entry(entry)
        }
        if len(described) > 1:
            why = f"{ours} is one file or directory: put the files into one directory"
            return Outcome(missing={**lost, "": why})
        path, columns = _path_of(described[0], ours), _columns_of(described[0])
        settings: dict[str, Any] = {ours: path} if path else {}
        if columns and ours == "data":
            settings["columns"] = columns
        elif ours != "data" and columns != _columns_of(_entries(keys.get("datasets"))[0]):
            why = "columns are the same for training and validation: rename those of one"
            lost["[0].field"] = why
        return Outcome(settings, missing=lost)

    return rule


def _entries(value: Any) -> list[dict[str, Any]]:
    """Return the data sets of a list, or the only one; a path alone becomes an entry."""
    entries = value if isinstance(value, list) and value else [value]
    return [entry if isinstance(entry, dict) else {"path": entry} for entry in entries]


def _path_of(entry: dict[str, Any], ours: str = "data") -> str | None:
    """Return the file, the directory or the hub's name of an entry; None if it names no such."""
    path, files = entry.get("path"), entry.get("data_files")
    if not is_off(files):
        files = files[0] if isinstance(files, list) and len(files) == 1 else files
        if not isinstance(files, str) or _is_hub(path):
            return None
        return files if path is None or path in _LOADERS else f"{path}/{files}"
    if path is None or path in _LOADERS:
        return None
    name, split = entry.get("name"), entry.get("split")
    usual = (None, "", "train") if ours == "data" else (None, "")
    if not _is_hub(path) or not _is_split(split) or (not name and split in usual):
        return str(path)
    return ":".join(str(part) for part in (path, name, split or "train") if part)


def _is_hub(path: Any) -> bool:
    text = str(path)
    is_name = text.count("/") == 1 and text[0] not in "./~"
    return is_name and "." not in text.rpartition("/")[2][-6:]


def _is_split(split: Any) -> bool:
    """Whether a split has a name alone, without rows in brackets."""
    return is_off(split) or re.fullmatch(r"[\w.-]+", str(split)) is not None


def _columns_of(entry: dict[str, Any]) -> dict[str, str]:
    """Return the columns that an entry names, by part, where they are not the usual ones."""
    kind = entry.get("type")
    fields = {**entry, **(kind if isinstance(kind, dict) else {})}
    return {
        part: str(fields[key])
        for key, part in _PARTS.items()
        if isinstance(fields.get(key), str) and fields[key] != part
    }


def _lost_of_entry(entry: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the keys of an entry that have no equivalent, with what to do."""
    found = []
    for key, value in entry.items():
        is_read = key in ("path", "ds_type", *_PARTS)
        if is_read or is_off(value):
            continue
        if key in ("data_files", "split", "name"):
            found += [(key, why) for why in _why_not_named(entry, key)]
        elif key == "type" and isinstance(value, dict):
            found += [(f"type.{k}", _COLUMNS) for k, v in value.items() if k not in _PARTS and v]
        elif key == "type":
            if value.partition(".")[0].partition(":")[0] not in _READ_TYPES:
                found.append(("type", f"the format {value}: {_COLUMNS}"))
        elif key in _TURN_KEYS:
            if not _is_usual(value):
                found.append((key, "turns have role and content, or from and value"))
        elif key in ("roles", "roles_to_train", "train_on_eos"):
            if not _is_usual(value):
                found.append((key, _TURNS))
        else:
            found.append((key, "has no equivalent here"))
    return found


def _why_not_named(entry: dict[str, Any], key: str) -> list[str]:
    """Return why the files, the split or the configuration of an entry are not in its path."""
    is_hub = _is_hub(entry.get("path"))
    if key == "data_files":
        why = "put these files into one directory, and name that"
        return [] if _path_of(entry) else [f"download and {why}" if is_hub else why]
    if is_hub and is_off(entry.get("data_files")):
        is_named = _is_split(entry.get("split"))
        return [] if is_named else ["a split has a name alone: write its rows to a file"]
    is_whole = key == "split" and entry[key] == "train"
    return [] if is_whole else ["only data sets of the hub have it: name the file itself"]


def _is_usual(value: Any) -> bool:
    """Whether a mapping of roles or fields only says what is read anyway."""
    usual = {"role", "content", "from", "value", "user", "human", "assistant", "gpt", "system"}
    usual |= {"tool", "turn", "input", "output"}
    if isinstance(value, dict):
        return all(_is_usual(part) for pair in value.items() for part in pair)
    return all(word in usual for word in words(value))


def _adapter(value: Any, keys: Keys) -> Outcome:
    if value == "qlora":  # axolotl's other backend has its dtype in `peft`
        is_other = isinstance(keys.get("peft"), dict) and "weight_dtype" in keys["peft"]
        return Outcome(note="see peft") if is_other else nf4(keys)
    if value == "lora":
        return Outcome(note="LoRA is what trains")
    if value == "none, all weights":
        return Outcome({"full": "true"}, "without adapter: all weights train")
    return Outcome(missing={"": "LoRA and full fine-tuning are what there is"})


def _target_modules(value: Any, keys: Keys) -> Outcome:
    if is_on(keys.get("lora_target_linear")):
        return Outcome(note="lora_target_linear takes all of them")
    return Outcome({"targets": words(value)})


def _target_linear(value: Any, keys: Keys) -> Outcome:
    return Outcome({"targets": "all-linear"}) if is_on(value) else Outcome(note="off")


def _special_tokens(value: Any, keys: Keys) -> Outcome:
    named = value if isinstance(value, dict) else {}
    lost = {
        f".{name}": "the tokens of the model's tokenizer are used"
        for name, token in named.items()
        if name != "pad_token" and not is_off(token)
    }
    return Outcome(note="padding has no loss and is not attended to", missing=lost)


def _chat_template(value: Any, keys: Keys) -> Outcome:
    if value == "tokenizer_default":
        return Outcome(note="the model's own chat template is used")
    if value == "jinja":
        return Outcome(note="see chat_template_jinja")
    why = f"the model's own template is used; look with lora data whether it is {value}"
    return Outcome(missing={"": f"{why}, or give a file with chat_template"})


def _jinja(value: Any, keys: Keys) -> Outcome:
    if str(value).endswith((".jinja", ".jinja2", ".j2")):
        return Outcome({"chat_template": value})
    return Outcome(missing={"": "chat_template is a file: save the template, and name the file"})


def _plugins(value: Any, keys: Keys) -> Outcome:
    lost = {
        f": {name}": "there are no plugins"
        for name in words(value)
        if "liger" not in name.lower() and "cut_cross_entropy" not in name.lower()
    }
    return Outcome(note=KERNELS, missing=lost)


def _deduplicate(value: Any, keys: Keys) -> Outcome:
    return Outcome(note="off") if is_off(value) else Outcome(missing={"": "lora data counts them"})


_RULES: dict[str, Rule] = {
    **SHARED,
    "base_model": same("model"),
    **dict.fromkeys(
        ("base_model_config", "tokenizer_config", "model_type", "tokenizer_type"), nothing(_FILES)
    ),
    **dict.fromkeys(
        ("is_mistral_derived_model", "is_llama_derived_model", "is_qwen_derived_model"),
        nothing(_FILES),
    ),
    **dict.fromkeys(("tokenizer_use_fast", "tokenizer_legacy", "strict"), nothing(_FILES)),
    "revision_of_model": missing("download that revision, and name its directory as model"),
    "adapter": _adapter,
    "bnb_config_kwargs": axolotl_kwargs,
    "bnb_4bit_use_double_quant": axolotl_double,
    "peft": axolotl_peft,
    "gptq": gptq,
    "gptq_disable_exllama": nothing("see gptq"),
    "qlora_sharded_model_loading": nothing(SHARDING),
    "lora_model_dir": same("from_adapter"),
    "lora_target_modules": _target_modules,
    "lora_target_linear": _target_linear,
    "lora_fan_in_fan_out": nothing("layers of that kind are found"),
    "lora_on_cpu": nothing("an adapter takes little memory"),
    "peft_init_lora_weights": missing("A is Kaiming-uniform and B zero, as PEFT's default"),
    "loraplus_lr_ratio": missing("A and B have one learning rate"),
    "datasets": _datasets("data"),
    "test_datasets": _datasets("eval_data"),
    "dataset_prepared_path": nothing(CACHES),
    "dataset_processes": nothing(CACHES),
    "dataset_exact_deduplication": _deduplicate,
    "shuffle_merged_datasets": nothing("examples are shuffled by seed"),
    "val_set_size": validation_size,
    "sample_packing": same("packing"),
    "eval_sample_packing": nothing("validation is packed as training"),
    "pad_to_sequence_len": nothing("padding has no loss and is not attended to"),
    "micro_batch_size": batch("gradient_accumulation_steps", "micro_batch_size"),
    "gradient_accumulation_steps": batch("gradient_accumulation_steps", "micro_batch_size"),
    "batch_size": nothing("micro_batch_size and gradient_accumulation_steps say it"),
    "eval_batch_size": nothing("evaluation takes the sequences of one pass"),
    "num_epochs": epochs,
    "evals_per_epoch": per_epoch("eval_every_steps"),
    "saves_per_epoch": per_epoch("save_every_steps"),
    "cosine_min_lr_ratio": same("min_rate_fraction"),
    "loss_watchdog_threshold": missing(
        "jumps of the loss and divergence are reported; they end no run"
    ),
    "loss_watchdog_patience": nothing("see loss_watchdog_threshold"),
    "special_tokens": _special_tokens,
    "tokens": same("special_tokens", note="their embedding rows are trained"),
    "chat_template": _chat_template,
    "chat_template_jinja": _jinja,
    "plugins": _plugins,
    "rl": refused("it is preference training"),
    "reward_model": refused("it is the training of a reward model"),
    "eval_max_new_tokens": same("sample_tokens", note="of the answers during training"),
    "eval_table_size": nothing("samples answers are shown at each evaluation"),
    "use_tensorboard": same("tensorboard"),
    "debug": nothing("lora data shows what is learned"),
    "local_rank": nothing("torchrun and --devices say it"),
}
_PREFIXES: dict[str, Rule] = {
    "wandb_": missing(NO_TRACKER),
    "mlflow_": missing(NO_TRACKER),
    "comet_": missing(NO_TRACKER),
    "flash_attention": nothing(KERNELS),
    "flash_attn": nothing(KERNELS),
    "xformers_attention": nothing(KERNELS),
    "sdp_attention": nothing(KERNELS),
    "attn_implementation": nothing(KERNELS),
    "liger_": nothing(KERNELS),
    "unsloth_": nothing(KERNELS),
    "torch_compile": nothing(KERNELS),
    "lora_mlp_kernel": nothing(KERNELS),
    "lora_qkv_kernel": nothing(KERNELS),
    "lora_o_kernel": nothing(KERNELS),
    "cut_cross_entropy": nothing(KERNELS),
    "fsdp": nothing(SHARDING),
    "ddp": nothing("gradients are summed without torch's DDP"),
    "tensor_parallel": missing(NO_TENSOR_PARALLEL),
    "context_parallel": missing(NO_TENSOR_PARALLEL),
    "sequence_parallel": missing(NO_TENSOR_PARALLEL),
}
AXOLOTL = Tool(
    "axolotl",
    frozenset(
        (
            "base_model",
            "datasets",
            "sequence_len",
            "micro_batch_size",
            "val_set_size",
            "adapter",
            "sample_packing",
            "lora_r",
            "lora_target_linear",
            "dataset_prepared_path",
            "num_epochs",
        )
    ),
    _RULES,
    _PREFIXES,
    defaults={
        "adapter": "none, all weights",
        "micro_batch_size": "1",
        "num_epochs|max_steps": "1",
        "warmup_ratio|warmup_steps": "0.03",
        "sequence_len": "512",
        "sample_packing": "false",
        "val_set_size": "0",
        "lora_dropout": "0",
        "weight_decay": "0",
        "cosine_min_lr_ratio": "0",
        "seed": "42",
    },
)
"""Defaults: axolotl.utils.schemas, version of 2026."""
