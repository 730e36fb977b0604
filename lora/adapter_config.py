"""PEFT's `adapter_config.json`, in and out. What changes the result is honoured or refused.

Source of the format: PEFT's LoraConfig, as its version 0.21 writes it.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from lora.apply import ALL_LINEAR, AppliedLoRA, lora_layers, matches, output_head_name
from lora.config import LoRAConfig
from lora.errors import did_you_mean
from lora.variants import LoRAConv1D, is_adaptable

CONFIG_FILE = "adapter_config.json"

_HONOURED = {
    "alpha_pattern",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_rslora",
}
_WITHOUT_EFFECT = {  # on the logits of a loaded adapter
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "fan_in_fan_out",  # says how the base's weight lies; the base itself shows that
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
_NEUTRAL_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_WHY_REFUSED = {
    "use_dora": "DoRA scales every column by a learned magnitude, which plain LoRA has not",
    "bias": "the adapter brings biases of its own",
    "lora_bias": "B has a bias of its own",
    "init_lora_weights": "this start changes the base's weights (PiSSA, OLoRA, CorDA, LoftQ)",
    "trainable_token_indices": "single rows of the embedding were trained",
    "layer_replication": "blocks of the base are repeated",
    "target_parameters": "parameters that belong to no linear layer were adapted",
    "alora_invocation_tokens": "the adapter is active from a token on only",
    "ensure_weight_tying": "two modules share one trained copy",
}


def describe_adapter(
    model: nn.Module, applied: AppliedLoRA, base_name: str | None
) -> dict[str, Any]:
    """Return `adapter_config.json`'s content for the LoRA that is on `model`."""
    layers = lora_layers(model)
    config = applied.config
    ranks = {name: layer.rank for name, layer in layers.items() if layer.rank != config.rank}
    alphas = {name: layer.alpha for name, layer in layers.items() if layer.alpha != config.alpha}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": _shortest_names(model, applied.target_names),
        "modules_to_save": sorted(applied.originals) or None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_rslora": config.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(layer, LoRAConv1D) for layer in layers.values()),
        "init_lora_weights": True,
    }


def read_description(
    described: dict[str, Any], model: nn.Module
) -> tuple[LoRAConfig | None, list[str]]:
    """Return the LoRAConfig that `described` means for `model`, and all that is wrong with it.

    The config names its layers in full. It is None if there are faults that leave no config.
    """
    faults = _check_fields(described)
    if faults:
        return None, faults
    names, faults = _target_names(described, model)
    saved: list[str] = []
    for wanted in described.get("modules_to_save") or ():
        found = [n for n, _ in model.named_modules() if n and matches(n, wanted)]
        faults += [] if found else [f"modules_to_save {wanted!r} is no module of the model"]
        saved += found
    # PEFT trains a saved head whole although the targets take it in.
    names = [name for name in names if name not in saved]
    if faults or not names:
        return None, faults or ["target_modules matches no linear layer of the model"]
    config = LoRAConfig(
        rank=described["r"],
        alpha=float(described["lora_alpha"]),
        dropout=float(described.get("lora_dropout") or 0.0),
        targets=tuple(names),
        modules_to_save=tuple(saved),
        rslora=bool(described.get("use_rslora")),
        rank_pattern=_by_full_name(described.get("rank_pattern"), names),
        alpha_pattern=_by_full_name(described.get("alpha_pattern"), names),
    )
    return config, []


def _check_fields(described: dict[str, Any]) -> list[str]:
    faults = []
    if described.get("peft_type") != "LORA":
        faults.append(f"peft_type is {described.get('peft_type')!r}: allowed is 'LORA'")
    rank, alpha = described.get("r"), described.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        faults.append(f"r is {rank!r}: allowed is an int ≥ 1")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha > 0:
        faults.append(f"lora_alpha is {alpha!r}: allowed is a number > 0")
    dropout = described.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        faults.append(f"lora_dropout is {dropout!r}: allowed is 0 ≤ dropout < 1")
    if not described.get("target_modules"):
        faults.append("target_modules is missing or empty")
    for name, kind in (("rank_pattern", int), ("alpha_pattern", int | float)):
        pattern = described.get(name) or {}
        if not isinstance(pattern, dict) or not all(
            isinstance(value, kind) and value > 0 for value in pattern.values()
        ):
            faults.append(f"{name} is {pattern!r}: allowed are names with numbers > 0")
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if not _is_names(described.get(name)):
            faults.append(f"{name} is {described[name]!r}: allowed are a string or strings")
    for name, value in described.items():
        if name in _HONOURED | _WITHOUT_EFFECT or _is_neutral(name, value):
            continue
        why = _WHY_REFUSED.get(name, "lora does not know this setting, so it cannot honour it")
        faults.append(f"{name} is {value!r}: {why}")
    return faults


def _is_neutral(name: str, value: Any) -> bool:
    if name == "init_lora_weights":
        return value in _NEUTRAL_INITS
    return not value or (name == "bias" and value == "none")


def _is_names(value: Any) -> bool:
    if value is None or isinstance(value, str):
        return True
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _target_names(described: dict[str, Any], model: nn.Module) -> tuple[list[str], list[str]]:
    targets = described["target_modules"]
    modules = {name: module for name, module in model.named_modules() if name}
    linears = [name for name, module in modules.items() if is_adaptable(module)]
    if targets == ALL_LINEAR:
        head = output_head_name(model)
        names = [name for name in linears if name != head]
    else:
        names = [name for name in modules if _peft_matches(name, targets)]
    excluded = described.get("exclude_modules")
    if excluded:
        names = [name for name in names if not _peft_matches(name, excluded)]
    layers = described.get("layers_to_transform")
    if layers is not None:
        wanted = [layers] if isinstance(layers, int) else layers
        names = [n for n in names if _peft_layer(n, described.get("layers_pattern")) in wanted]
    faults = [
        f"target {name!r} is a {type(modules[name]).__name__}, which LoRA cannot wrap here"
        for name in names
        if name not in linears
    ]
    endings = {name.rpartition(".")[2] for name in linears}
    for target in targets if isinstance(targets, list) else []:
        if not any(matches(name, target) for name in modules):
            near = did_you_mean(target.rpartition(".")[2], endings)
            faults.append(f"target {target!r} matches no layer of the model.{near}")
    return names, faults


def _peft_matches(name: str, targets: str | list[str]) -> bool:
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, name) is not None
        except re.error:
            return False
    return any(matches(name, target) for target in targets)


def _peft_layer(name: str, pattern: str | list[str] | None) -> int | None:
    patterns = [pattern] if isinstance(pattern, str) else pattern
    for word in patterns or [r"[^.]*"]:
        found = re.match(rf".*\.?{word}\.(\d+)\.", name)
        if found:
            return int(found.group(1))
    return None


def _by_full_name(pattern: dict[str, Any] | None, names: list[str]) -> dict[str, Any]:
    resolved = {}
    for name in names:
        for key, value in (pattern or {}).items():
            if re.match(rf"(.*\.)?({key})$", name):  # PEFT reads the keys as patterns
                resolved[name] = value
                break
    return resolved


def _shortest_names(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    endings = sorted({name.rpartition(".")[2] for name in names})
    taken = {n for n, _ in model.named_modules() if any(matches(n, e) for e in endings)}
    # Endings serve if they take in just these layers; numbers alone (of a Sequential) never do.
    if taken == set(names) and not any(ending.isdigit() for ending in endings):
        return endings
    return sorted(names)
