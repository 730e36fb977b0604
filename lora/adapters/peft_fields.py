"""The fields of PEFT's `adapter_config.json`: honoured, without effect here, or refused.

Source: PEFT's LoraConfig, version 0.21.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora.adapters.patterns import why_not_pattern
from lora.lora_module import MAX_ALPHA, MAX_RANK

_HONOURED = {
    "alpha_pattern",
    "ensure_weight_tying",  # refused where it has an effect, once the base is known
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
    "trainable_token_indices",
    "use_rslora",
}
_WITHOUT_EFFECT = {  # on what a loaded adapter computes
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",  # these four configure an initialization, which init_lora_weights names
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "fan_in_fan_out",  # whether the base's weight is transposed: known from the base itself
    "inference_mode",
    "megatron_core",  # a module's name, used only with megatron_config
    "peft_version",
    "qalora_group_size",  # used only with use_qalora
    "revision",
    "runtime_config",
    "task_type",
}
WHOLE, AT_END = "{}", r"(.*\.)?({})$"
IN_SAVED, IN_LAYERS, ANY_LAYER = (
    r"(^|.*\.){}($|\..*)",
    r"(?:^|.*?\.){}\.(\d+)\.",
    r".*?\.[^.]*\.(\d+)\.",
)
"""The expressions that PEFT makes of a pattern in a field."""
_PATTERN_FORMS = {
    "target_modules": WHOLE,
    "exclude_modules": WHOLE,
    "modules_to_save": IN_SAVED,
    "layers_pattern": IN_LAYERS,
    "rank_pattern": AT_END,
    "alpha_pattern": AT_END,
}
_NEUTRAL_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_WHY_REFUSED = {
    "alora_invocation_tokens": "the adapter is active only after certain tokens",
    "bias": "the base's biases were trained too",
    "init_lora_weights": "this initialization changes the base's weights (PEFT can convert it:"
    " save_pretrained with path_initial_model_for_weight_conversion)",
    "layer_replication": "blocks of the base are repeated",
    "lora_bias": "B has a bias of its own",
    "megatron_config": "the base's linears are Megatron's",
    "target_parameters": "parameters outside linear layers were adapted",
    "use_dora": "DoRA scales each column by a trained magnitude",
    "use_qalora": "QA-LoRA pools the inputs in groups",
}


def check_fields(values: dict[str, Any]) -> list[str]:
    """Return a fault for each field of `adapter_config.json` that is wrong or cannot be honoured.

    An unknown field is accepted if it is switched off (false, null, empty).
    """
    faults = _wrong_types(values)
    for name, value in values.items():
        neutral = not value or (name == "bias" and value == "none")
        if name == "init_lora_weights":
            neutral = value in _NEUTRAL_INITS
        if name not in _HONOURED | _WITHOUT_EFFECT and not neutral:
            why = _WHY_REFUSED.get(name, "this field is unknown and cannot be honoured")
            faults.append(f"{name}={value!r}: {why}")
    return faults


def _wrong_types(values: dict[str, Any]) -> list[str]:
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "peft_type": (lambda v: v == "LORA", "'LORA'"),
        "r": (_is_rank, f"an int from 1 to {MAX_RANK}"),
        "lora_alpha": (_is_alpha, f"a number > 0, at most {MAX_ALPHA:g}"),
        "lora_dropout": (lambda v: not v or (_is_alpha(v) and v < 1), "0 ≤ dropout < 1"),
        "use_rslora": (lambda v: v is None or isinstance(v, bool), "true or false"),
        "target_modules": (lambda v: bool(v) and _are_names(v), "a pattern or a list of names"),
        "exclude_modules": (lambda v: not v or _are_names(v), "a pattern or a list of names"),
        "modules_to_save": (
            lambda v: not v or (not isinstance(v, str) and _are_names(v)),
            "a list of names",
        ),
        "layers_to_transform": (
            lambda v: v is None or _is_int(v) or (isinstance(v, list) and all(map(_is_int, v))),
            "an int or a list of ints",
        ),
        "trainable_token_indices": (
            lambda v: not v or all(map(_are_rows, v.values() if isinstance(v, dict) else [v])),
            "a list of ids ≥ 0, each once, or such lists by module",
        ),
        "layers_pattern": (lambda v: not v or _are_names(v), "a name or a list of names"),
        "rank_pattern": (
            lambda v: not v or _is_pattern(v, _is_rank),
            f"names with ints from 1 to {MAX_RANK}",
        ),
        "alpha_pattern": (
            lambda v: not v or _is_pattern(v, _is_alpha),
            f"names with numbers > 0, at most {MAX_ALPHA:g}",
        ),
    }
    faults = [
        f"{name}={values.get(name)!r}: allowed is {allowed}"
        for name, (is_right, allowed) in checks.items()
        if not is_right(values.get(name))
    ]
    return faults or _wrong_patterns(values)


def _wrong_patterns(values: dict[str, Any]) -> list[str]:
    """Return a fault for each pattern in a field of the right type that is not accepted."""
    faults = []
    for field, form in _PATTERN_FORMS.items():
        value = values.get(field) or ()
        if form is WHOLE and not isinstance(value, str):
            continue  # a list of names, which PEFT compares as they are
        for pattern in [value] if isinstance(value, str) else value:
            why = why_not_pattern(pattern) or why_not_pattern(form.format(pattern))
            faults += [] if why is None else [f"{field}: the pattern {pattern!r}: {why}"]
    return faults


def _are_names(value: Any) -> bool:
    words = [value] if isinstance(value, str) else value
    return isinstance(words, list) and all(isinstance(word, str) for word in words)


def _is_pattern(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(is_right(number) for number in value.values())


def _are_rows(value: Any) -> bool:
    are_ids = isinstance(value, list) and all(_is_int(number) and number >= 0 for number in value)
    return are_ids and 0 < len(set(value)) == len(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    # Some tools write 4.0 for 4.
    whole = _is_int(value) or (isinstance(value, float) and value.is_integer())
    return whole and 1 <= value <= MAX_RANK


def _is_alpha(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value <= MAX_ALPHA  # false for NaN
