"""The pages for people who know another tool: what they did there, and its settings here.

Settings come from lora/settings/peers.py, the table by which the command line knows these names.
"""

from __future__ import annotations

import dataclasses
import re

from lora.config import DataConfig, LoRAConfig, MemoryConfig, RunConfig, TrainConfig
from lora.settings.peers import PeerSetting, find_peer

OURS = {
    field.name
    for config in (LoRAConfig, TrainConfig, DataConfig, RunConfig, MemoryConfig)
    for field in dataclasses.fields(config)
} | {"model", "data", "eval_data", "full", "base_dtype", "nf4_double_quant"}
"""Settings of lora finetune."""
SAMPLES = {
    "per_device_train_batch_size": "4",
    "micro_batch_size": "4",
    "gradient_accumulation_steps": "8",
    "output_dir": "out/run1",
    "adapter_path": "out/run1",
    "warmup_steps": "10",
    "max_steps": "200",
    "iters": "200",
    "finetuning_type": "full",
    "report_to": "tensorboard",
    "gptq": "true",
}
"""Values for the examples of settings that are written otherwise here."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """Another tool: how its work is done here, and its settings."""

    name: str
    intro: str
    steps: tuple[tuple[str, str], ...]
    """(what one does there, the command or code here)."""
    settings: str
    """Names, separated by spaces."""
    note: str = ""


_FINETUNE = "lora finetune train.jsonl --name run1"
_RESUME = "lora finetune --name run1 --resume"
_MERGE = "lora merge runs/run1/adapter merged"
_CONVERT = (
    "`lora convert-config FILE --out run.yaml` turns a whole file into one for "
    "`lora finetune run.yaml`, and lists each key that has no equivalent here."
)
_TRAINER = (
    "per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps "
    "learning_rate lr_scheduler_type warmup_ratio warmup_steps weight_decay max_grad_norm optim "
    "bf16 gradient_checkpointing eval_steps save_steps save_total_limit logging_steps seed "
    "output_dir report_to"
)
ORIGINS = {
    "peft": Origin(
        "PEFT",
        "The files are PEFT's: an adapter that is trained here loads there and the other way "
        "round, and every field of its config that changes the result is honoured or refused.",
        (
            ("`get_peft_model(model, config)`", "`lora.apply_lora(model, config)`"),
            ("`model.disable_adapter()`", "`lora.disabled_adapter(model)`"),
            ("`model.save_pretrained(folder)`", "`lora.save_adapter(model, folder)`"),
            ("`PeftModel.from_pretrained(...)`", "`lora.load_adapter(model, folder)`"),
            ("`model.merge_and_unload()`", f"`lora.merge_lora(model, ids)` or `{_MERGE}`"),
            ("`print_trainable_parameters()`", "`lora.count_lora_parameters(model)`"),
            (
                "`BitsAndBytesConfig(load_in_4bit=True)`, `prepare_model_for_kbit_training`",
                f"`{_FINETUNE} --base-dtype nf4`",
            ),
        ),
        "r lora_alpha lora_dropout target_modules exclude_modules modules_to_save use_rslora "
        "layers_to_transform rank_pattern alpha_pattern use_dora load_in_4bit load_in_8bit "
        "bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_compute_dtype "
        "bnb_4bit_quant_storage llm_int8_threshold",
    ),
    "trl": Origin(
        "TRL and transformers",
        "One command reads the data, applies LoRA, trains, evaluates and saves. Data formats are "
        "the same: messages, prompt and completion, text.",
        (
            ("`SFTTrainer(...).train()`", f"`{_FINETUNE}`"),
            ("`trl sft --config FILE`", "`lora finetune run.yaml`"),
            ("`trainer.train(resume_from_checkpoint=True)`", f"`{_RESUME}`"),
            ("`trainer.evaluate()`", "`lora eval test.jsonl --adapter runs/run1/adapter`"),
            ("`pipeline(...)`", '`lora generate "Hello" --adapter runs/run1/adapter`'),
        ),
        "model_name_or_path dataset_name max_length packing assistant_only_loss "
        f"completion_only_loss lora_r lora_alpha lora_dropout lora_target_modules {_TRAINER} "
        "load_in_4bit load_in_8bit bnb_4bit_quant_type use_bnb_nested_quant "
        "bnb_4bit_quant_storage",
    ),
    "unsloth": Origin(
        "Unsloth",
        "Nothing is patched: `lora finetune` takes its fused training step where it supports the "
        "model, and says at the start which step it takes and why. Unsloth quantises the base to "
        "4 bits unless told otherwise; here `--base-dtype nf4` does, with the same values.",
        (
            ("`FastLanguageModel.from_pretrained(...)`", "`lora.load_model(name)`"),
            ("`FastLanguageModel.get_peft_model(...)`", "`lora.apply_lora(model, config)`"),
            ("`SFTTrainer(...).train()`", f"`{_FINETUNE}`"),
            ("`model.save_pretrained_merged(...)`", f"`{_MERGE}`"),
            (
                "`model.save_pretrained_gguf(...)`",
                "`lora export run1.gguf --adapter runs/run1/adapter --dtype q8_0`",
            ),
        ),
        "model_name max_seq_length load_in_4bit load_in_8bit load_in_fp8 load_in_16bit r "
        "lora_alpha lora_dropout target_modules "
        f"use_rslora {_TRAINER}",
    ),
    "axolotl": Origin(
        "axolotl",
        _CONVERT,
        (
            ("`axolotl train FILE`", "`lora finetune run.yaml`"),
            ("`axolotl preprocess FILE --debug`", "`lora data train.jsonl`"),
            ("`axolotl inference FILE`", "`lora chat --adapter runs/run1/adapter`"),
            ("`axolotl merge-lora FILE`", f"`{_MERGE}`"),
            ("`axolotl evaluate FILE`", "`lora eval test.jsonl --adapter runs/run1/adapter`"),
        ),
        "base_model datasets sequence_len sample_packing val_set_size train_on_inputs lora_r "
        "lora_alpha lora_dropout lora_target_modules lora_target_linear lora_modules_to_save "
        "peft_layers_to_transform peft_use_rslora peft_use_dora lora_model_dir micro_batch_size "
        "gradient_accumulation_steps num_epochs max_steps learning_rate lr_scheduler warmup_steps "
        "warmup_ratio cosine_min_lr_ratio optimizer bf16 gradient_checkpointing load_in_4bit "
        "load_in_8bit bnb_4bit_use_double_quant gptq early_stopping_patience eval_steps save_steps "
        "output_dir wandb_project",
    ),
    "llama-factory": Origin(
        "LLaMA-Factory",
        _CONVERT,
        (
            ("`llamafactory-cli train FILE`", "`lora finetune run.yaml`"),
            ("`llamafactory-cli chat FILE`", "`lora chat --adapter runs/run1/adapter`"),
            ("`llamafactory-cli export FILE`", f"`{_MERGE}`"),
            (
                "`predict_with_generate`",
                "`lora eval test.jsonl --adapter runs/run1/adapter --predictions out.jsonl`",
            ),
        ),
        "model_name_or_path finetuning_type lora_rank lora_alpha lora_dropout lora_target "
        "additional_target use_rslora use_dora adapter_name_or_path dataset cutoff_len "
        f"train_on_prompt packing val_size max_samples quantization_bit "
        f"quantization_type quantization_method double_quantization {_TRAINER}",
    ),
    "mlx-lm": Origin(
        "mlx-lm",
        "Linux and NVIDIA GPUs, or a CPU; Apple's GPUs are not supported. `--batch-size` counts "
        "the sequences of a whole optimizer step. QLoRA, which `mlx_lm.lora` trains where the "
        "model is quantised, is the unquantised model with `--base-dtype nf4`.",
        (
            ("`mlx_lm.lora --train --data FOLDER`", f"`{_FINETUNE}`"),
            ("`mlx_lm.lora --test`", "`lora eval test.jsonl --adapter runs/run1/adapter`"),
            (
                "`mlx_lm.generate --prompt TEXT`",
                '`lora generate "Hello" --adapter runs/run1/adapter`',
            ),
            ("`mlx_lm.fuse`", f"`{_MERGE}`"),
        ),
        "model data iters batch_size grad_accumulation_steps learning_rate num_layers "
        "max_seq_length mask_prompt grad_checkpoint adapter_path resume_adapter_file "
        "steps_per_eval save_every seed",
    ),
}


def coming_from_pages() -> dict[str, str]:
    """Return by path inside the site: the page of each tool, and their list."""
    pages = {f"coming-from/{name}.md": origin_page(origin) for name, origin in ORIGINS.items()}
    rows = "".join(f"- [{origin.name}]({name}.md)\n" for name, origin in ORIGINS.items())
    pages["coming-from/index.md"] = (
        "# Coming from another tool\n\nFlags and YAML keys of these tools are accepted where they "
        "mean the same, and refused with the setting to write where they do not.\n\n" + rows
    )
    return pages


def origin_page(origin: Origin) -> str:
    """Return the page of one tool."""
    steps = "".join(f"| {there} | {here} |\n" for there, here in origin.steps)
    names = list(dict.fromkeys(origin.settings.split()))
    rows = "".join(setting_row(name, names) for name in names)
    return (
        f"# Coming from {origin.name}\n\n{origin.intro}\n\n"
        f"| there | here |\n|---|---|\n{steps}\n"
        f"## Settings\n\n| there | here | |\n|---|---|---|\n{rows}"
    )


def setting_row(name: str, names: list[str]) -> str:
    """Return the row of one setting of another tool."""
    peer = find_peer(name)
    if name in OURS and (peer is None or peer.ours == name):
        return f"| `{name}` | `--{name.replace('_', '-')}` | |\n"
    if peer is None:
        raise ValueError(f"{name} is neither ours nor in lora/settings/peers.py")
    if not peer.because:
        return f"| `{name}` | {flag_of(str(peer.ours))} | {values_of(peer)} |\n"
    given = {other: SAMPLES[other] for other in names if other in SAMPLES}
    instead = peer.instead(SAMPLES.get(name, ""), given)
    flags = " ".join(
        f"--{key.replace('_', '-')}" + ("" if value == "true" else f" {value}")
        for key, value in instead.items()
    )
    example = ""
    if flags and name in SAMPLES:
        used = [name] + [o for o in given if o != name and o in peer_inputs(name)]
        example = " (for " + ", ".join(f"`{key}: {SAMPLES[key]}`" for key in used) + ")"
    shown = f"`{flags}`{example}" if flags else "–"
    return f"| `{name}` | {shown} | {sentence(peer.because)} |\n"


def peer_inputs(name: str) -> tuple[str, ...]:
    """Return the other settings that the example of `name` depends on."""
    return {
        "per_device_train_batch_size": ("gradient_accumulation_steps",),
        "micro_batch_size": ("gradient_accumulation_steps",),
        "warmup_steps": ("max_steps",),
    }.get(name, ())


def flag_of(ours: str) -> str:
    """Return a setting of ours as a flag."""
    return f"`--{ours.replace('_', '-')}`"


def values_of(peer: PeerSetting) -> str:
    """Return how values are written here, and what one should know."""
    pairs = [f"`{there}` is `{here}`" for there, here in peer.values.items() if there != here]
    refused = [
        sentence(why) if value == "*" else f"`{value}` is refused: {sentence(why)}"
        for value, why in peer.refused.items()
    ]
    return ". ".join(filter(None, [", ".join(pairs), sentence(peer.note), *refused]))


def sentence(text: str) -> str:
    """Return a text of the table with our settings as flags."""
    return re.sub(r"`(\w+)`", lambda found: flag_of(found[1]), text)
