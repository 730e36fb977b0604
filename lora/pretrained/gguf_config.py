"""GGUF metadata converted to the content of a Hugging Face config.json.

Source of the keys: the GGUF specification; of the defaults for missing keys: llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora.decoder.families import OTHER_MODELS_ADVICE
from lora.decoder.fields import Fields, longrope_attention_factor
from lora.errors import ModelError, did_you_mean, gather
from lora.pretrained.gguf_file import GGUFFile

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "phi3": "phi3",
    "granite": "granite",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
"""Our families -> general.architecture."""
PERMUTED = ("llama", "smollm3", "granite")
"""Architectures whose files hold the rows of q and k in another order."""
OFFSET_NORMS = ("gemma2", "gemma3")
"""Architectures whose files hold 1 + w for a norm's weight w."""
GEMMA2_27B_LAYERS, GEMMA3_27B_LAYERS = 46, 62
"""Only these models scale by hidden size / heads instead of head_dim; files do not say so."""

ROPE_FACTORS = "rope_freqs.weight"
"""A tensor that is a setting, not a weight: Llama 3's factors of the rotary wavelengths."""
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
"""Two more: longrope's factors."""
SETTING_TENSORS = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)

_MAX_SIZE = 2**24
_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
    "sliding_window": "attention.sliding_window",
    "sliding_window_pattern": "attention.sliding_window_pattern",
    "rope_local_base_freq": "rope.freq_base_swa",
    "scaling": "rope.scaling.type",
    "factor": "rope.scaling.factor",
    "original": "rope.scaling.original_context_length",
    "heat": "rope.scaling.attn_factor",
    "rotary_dim": "rope.dimension_count",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
_NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.scale": None,
    "attn_logit_softcapping": 0,
    "embedding_scale": 1,
    "expert_count": 0,
    "final_logit_softcapping": 0,
    "logit_scale": 1,
    "residual_scale": 1,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
    "use_parallel_residual": False,
}
"""Keys that change the result, with the value at which they do not; checked if not read."""
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Rope scaling of Llama 3.1 to 3.3, all but the factor: files hold its result, not its settings."""


@dataclass(frozen=True)
class _Architecture:
    """One `general.architecture` in Hugging Face's terms."""

    name: str
    model_type: str
    extra: Callable[[Fields, GGUFFile, dict[str, Any]], dict[str, Any]]
    """Fields of config.json that only this architecture has."""


def gguf_config(file: GGUFFile) -> dict[str, Any]:
    """Return the content of config.json for `file`.

    Raises ModelError for an architecture that is not supported, and one ModelError for all
    settings that are missing, out of range, or not supported.
    """
    known = file.metadata.get("general.architecture")
    if not isinstance(known, str) or known not in _ARCHITECTURES:
        near = did_you_mean(str(known), _ARCHITECTURES)
        raise ModelError(
            f"Cannot load {file.path}: general.architecture is {known!r}. Supported: "
            f"{', '.join(_ARCHITECTURES)}.{near} Or take the model's Hugging Face folder: "
            f"{OTHER_MODELS_ADVICE}"
        )
    row = _ARCHITECTURES[known]
    names = {ours: f"{known}.{key}" for ours, key in _KEYS.items()}
    fields = Fields(file.metadata, names, {"scaling": "none"})
    config = {"architectures": [row.name], "model_type": row.model_type, "dtype": "float32"}
    config |= _sizes(fields, file)
    _check_sizes(fields, config)
    config |= row.extra(fields, file, config)
    config |= _rope_scaling(fields, file, config)
    _check_unsupported(fields, known, config)
    if fields.faults:
        heading = f"Cannot load {file.path}: it has unsupported settings:"
        advice = "Use another file, or the model's Hugging Face folder."
        raise ModelError(gather(fields.faults, heading, advice))
    return config


def _sizes(fields: Fields, file: GGUFFile) -> dict[str, Any]:
    heads, width = fields.count("num_attention_heads"), fields.count("hidden_size")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        fields.faults.append("the tensor token_embd.weight is missing")
    layers = fields.count("num_hidden_layers")
    if layers > len(file.tensors):  # each layer gets its own objects below
        fields.fault("num_hidden_layers", layers, f"at most the {len(file.tensors)} tensors there")
    ids = ("bos_token_id", "eos_token_id", "padding_token_id")
    tokens = {name: file.metadata.get(f"tokenizer.ggml.{name}") for name in ids}
    return {
        "hidden_size": width,
        "intermediate_size": fields.count("intermediate_size"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.count("num_key_value_heads", heads),
        "head_dim": fields.count("head_dim", max(1, width // heads)),
        "rms_norm_eps": _rounded(fields.number("rms_norm_eps")),
        "rope_theta": _rounded(fields.number("rope_theta", 10_000.0)),
        "max_position_embeddings": fields.count("max_position_embeddings"),
        "vocab_size": embedding.shape[0] if embedding else 1,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **{
            name.replace("padding", "pad"): tokens[name] for name in ids if tokens[name] is not None
        },
    }


def _check_sizes(fields: Fields, config: dict[str, Any]) -> None:
    """Refuse sizes that only a damaged file has: tensors of their products are allocated later."""
    for name in _KEYS:
        if isinstance(config.get(name), int) and config[name] > _MAX_SIZE:
            fields.fault(name, config[name], f"at most {_MAX_SIZE:,}")


def _check_unsupported(fields: Fields, architecture: str, config: dict[str, Any]) -> None:
    same = {"rope.dimension_count": "head_dim", "attention.value_length": "head_dim"}
    neutral = _NEUTRAL | {key: config[name] for key, name in same.items()}
    for key, value in neutral.items():
        name = f"{architecture}.{key}"
        seen = fields.values.get(name)
        if name not in fields.used and seen is not None and seen != value:
            allowed = "" if value is None else f", only {value!r}"
            fields.faults.append(f"{architecture}.{key}={seen!r}: not supported{allowed}")


def _llama_extra(fields: Fields, file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    _check_no_window(fields)
    return {
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
    }


def _qwen_extra(fields: Fields, file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    _check_no_window(fields)
    return {"hidden_act": "silu"}


def _smollm3_extra(fields: Fields, file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    own = {"no_rope_layer_interval": 4, "pad_token_id": config.get("pad_token_id")}
    return {**_llama_extra(fields, file, config), **own}


def _phi3_extra(fields: Fields, file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    width, rotates = config["head_dim"], fields.count("rotary_dim", config["head_dim"])
    share = rotates / width
    if int(width * share) < rotates:  # as the family reads it
        share = math.nextafter(share, 2.0)
    window = fields.get("sliding_window")  # 0: none
    return {
        "hidden_act": "silu",
        "partial_rotary_factor": share,
        "sliding_window": fields.count("sliding_window") if window else None,
        "pad_token_id": config.get("pad_token_id"),  # transformers' default is a real model's
    }


def _granite_extra(fields: Fields, file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    defaults = {
        "attention_multiplier": config["head_dim"] ** -0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": None,
    }
    read = {n: _rounded(fields.number(n, otherwise)) for n, otherwise in defaults.items()}
    return {**_llama_extra(fields, file, config), **read}


def _olmo2_extra(fields: Fields, file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    if not fields.get("sliding_window"):
        return {"hidden_act": "silu"}
    _check_one_theta(fields, config)
    return {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "hidden_act": "silu",
        "sliding_window": fields.count("sliding_window"),
        "layer_types": _layer_types(fields, file, config["num_hidden_layers"], 4),
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": config["rope_theta"]}
            for kind in ("full_attention", "sliding_attention")
        },
    }


def _gemma2_extra(fields: Fields, file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    _check_one_theta(fields, config)
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": fields.count("sliding_window", 4096),
        "layer_types": _layer_types(fields, file, layers, 2),
        "query_pre_attn_scalar": _gemma_scalar(config, GEMMA2_27B_LAYERS),
        "attn_logit_softcapping": _rounded(fields.number("attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": _rounded(fields.number("final_logit_softcapping", 30.0)),
    }


def _check_one_theta(fields: Fields, config: dict[str, Any]) -> None:
    theta = _rounded(fields.number("rope_local_base_freq", config["rope_theta"]))
    if theta != config["rope_theta"]:
        fields.fault("rope_local_base_freq", theta, f"{config['rope_theta']}, as in all blocks")


def _layer_types(fields: Fields, file: GGUFFile, layers: int, period: int) -> list[str]:
    """Return the type of each block: all but every so many have a window, or a list says which."""
    pattern = fields.get("sliding_window_pattern")
    if not isinstance(pattern, list):
        every = fields.count("sliding_window_pattern", period)
        pattern = [bool((number + 1) % every) for number in range(min(layers, len(file.tensors)))]
    return ["sliding_attention" if slides else "full_attention" for slides in pattern[:layers]]


def _gemma_scalar(config: dict[str, Any], layers_of_27b: int) -> int:
    if config["num_hidden_layers"] == layers_of_27b:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _check_no_window(fields: Fields) -> None:
    window, context = fields.get("sliding_window"), fields.get("max_position_embeddings")
    if window and context and window < context:
        fields.fault("sliding_window", window, "none, for this architecture")


def _gemma3_extra(fields: Fields, file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": fields.count("sliding_window"),
        "layer_types": _layer_types(fields, file, layers, 6),
        "query_pre_attn_scalar": _gemma_scalar(config, GEMMA3_27B_LAYERS),
        "rope_local_base_freq": _rounded(fields.number("rope_local_base_freq", 10_000.0)),
    }


_ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM", "llama", _llama_extra),
    "qwen2": _Architecture("Qwen2ForCausalLM", "qwen2", _qwen_extra),
    "qwen3": _Architecture("Qwen3ForCausalLM", "qwen3", _qwen_extra),
    "smollm3": _Architecture("SmolLM3ForCausalLM", "smollm3", _smollm3_extra),
    "phi3": _Architecture("Phi3ForCausalLM", "phi3", _phi3_extra),
    "granite": _Architecture("GraniteForCausalLM", "granite", _granite_extra),
    "olmo2": _Architecture("Olmo2ForCausalLM", "olmo2", _olmo2_extra),
    "gemma2": _Architecture("Gemma2ForCausalLM", "gemma2", _gemma2_extra),
    "gemma3": _Architecture("Gemma3ForCausalLM", "gemma3_text", _gemma3_extra),
}


def _rope_scaling(fields: Fields, file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    if LONG_FACTORS in file.tensors or SHORT_FACTORS in file.tensors:
        return _longrope_scaling(fields, file, config)
    kind = fields.choice("scaling", ("none", "linear", "yarn"))
    if ROPE_FACTORS in file.tensors:
        if kind != "none":
            fields.fault("scaling", kind, f"none, beside the tensor {ROPE_FACTORS}")
        return _llama3_scaling(fields, file, config)
    if kind == "none":
        return {}
    scaling = {"rope_type": kind, "factor": _rounded(fields.number("factor"))}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = fields.count("original")
    return {"rope_scaling": scaling}


def _longrope_scaling(fields: Fields, file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """Return longrope's settings; llama.cpp chooses the factors by the length of its context."""
    fields.choice("scaling", ("none", "longrope"))
    original = fields.count("original")
    scaling: dict[str, Any] = {"rope_type": "longrope"}
    for key, name in (("short_factor", SHORT_FACTORS), ("long_factor", LONG_FACTORS)):
        if name not in file.tensors:
            fields.faults.append(f"the tensor {name} is missing")
            return {}
        scaling[key] = file.values(name).reshape(-1).tolist()
    heat = fields.number("heat", 1.0)
    usual = longrope_attention_factor(config["max_position_embeddings"] / original, original)
    if not math.isclose(heat, usual, rel_tol=1e-6):
        scaling["attention_factor"] = _rounded(heat)
    return {"rope_scaling": scaling, "original_max_position_embeddings": original}


def _llama3_scaling(fields: Fields, file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """Return Llama 3's settings if they give the file's factors."""
    seen = file.values(ROPE_FACTORS).reshape(-1).astype(np.float64)
    scaling = {**LLAMA3, "factor": _rounded(seen.max())}
    wanted = llama3_factors(config["rope_theta"], config["head_dim"], scaling)
    if seen.shape != wanted.shape or not np.allclose(seen, wanted, rtol=1e-3):
        fields.faults.append(f"the factors in {ROPE_FACTORS} are not those of Llama 3.1 to 3.3")
    return {"rope_scaling": scaling}


def llama3_factors(theta: float, head_dim: int, scaling: dict[str, Any]) -> np.ndarray:
    """Return the factor by which llama3's `scaling` stretches each rotary wavelength, (D / 2,)."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)  # (D / 2,)
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return 1 / ((1 - kept) / factor + kept)


def _rounded(value: float) -> float:
    """Return an fp32 setting as the short decimal that it came from: 1e-05, not 9.99999974e-06."""
    return float(f"{float(value):.7g}")
