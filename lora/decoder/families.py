"""The supported model families as small deltas from Llama, and config.json → DecoderConfig.

A family is a row of `FAMILIES`: its names of the fields, transformers' defaults for absent ones,
and where it departs from Llama. Unsupported fields that would change the result are refused by
name. Known and ignored: dropout in training (LoRA has its own), token ids,
`reorder_and_upcast_attn` (precision only), `pretraining_tp`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lora.decoder.config import (
    AttentionConfig,
    BlockKind,
    DecoderConfig,
    FeedForwardConfig,
    LayerConfig,
    QkNorm,
)
from lora.decoder.family_layers import (
    FULL,
    gemma2_layers,
    gemma3_layers,
    gpt2_layers,
    mistral_layers,
    olmo3_layers,
    phi3_layers,
    plain_layers,
    qwen_layers,
    smollm3_layers,
)
from lora.decoder.fields import MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_SIZE, Fields
from lora.errors import ModelError, UnsupportedModelError, did_you_mean, gather

ACTIVATION_NAMES = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

_NEUTRAL: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "rope_local_base_freq": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "clip_qkv": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": None,
    "use_qk_norm": False,
    "qk_layernorm": False,
    "num_experts": None,
    "num_local_experts": None,
    "use_parallel_residual": False,
    "alibi": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "no_rope_layers": None,
    "text_config": None,
}
"""Fields that change the result, with the value at which they do not; checked if the family does
not read them."""

OTHER_MODELS_ADVICE = (
    "transformers' own code runs it: --implementation transformers, or auto where its package is "
    "installed."
)
"""What to do with a model that has no native decoder."""


@dataclass(frozen=True)
class Family:
    """How one family departs from Llama."""

    architecture: str
    """Class name in `architectures`."""
    layers: Callable[[Fields, int, float], tuple[LayerConfig, ...]]
    """(fields, number of blocks, scale of the attention logits) -> the blocks' settings."""
    names: dict[str, str] = field(default_factory=dict)
    """Our field names -> the family's own."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Transformers' defaults for absent fields, by our names."""
    block: BlockKind = "pre_norm"
    qkv_bias: bool | None = None
    """None: read from the field attention_bias, also for the output projection."""
    mlp_bias: bool | None = False
    """None: read from the field mlp_bias."""
    qk_norm: QkNorm | None = None
    embeddings_are_scaled: bool = False
    """By √C, rounded to the embedding's dtype."""
    has_softcaps: bool = False
    """Whether the fields of capped logits are read."""
    has_multipliers: bool = False
    """Whether Granite's multipliers are read."""
    is_fused: bool = False
    """Whether one linear makes queries, keys and values, and one gate and up."""


def decoder_config(config: dict[str, Any]) -> DecoderConfig:
    """Return the architecture that a config.json describes (transformers 4 and 5 layouts).

    Raises UnsupportedModelError for an architecture that is not supported, and one error that
    lists every field that is missing, out of range, or asks for something that is not supported:
    a ModelError if any of them is missing or out of range.
    """
    model_type = _find_family(config)
    family = FAMILIES[model_type]
    fields = Fields(config, family.names, family.defaults)
    hidden_size = fields.count("hidden_size", maximum=MAX_SIZE)
    heads = fields.count("num_attention_heads", maximum=MAX_HEADS)
    attention = _attention(fields, family, hidden_size, heads)
    feed_forward = _feed_forward(fields, family, hidden_size)
    scale = _attention_scale(fields, family, attention.head_dim)
    n_layers = fields.count("num_hidden_layers", maximum=MAX_LAYERS)
    parts: dict[str, Any] = {
        "vocab_size": fields.count("vocab_size", maximum=MAX_SIZE),
        "max_position_embeddings": fields.count("max_position_embeddings"),
        "norm_eps": fields.number("rms_norm_eps"),
        "tie_word_embeddings": fields.flag("tie_word_embeddings"),
        **_multipliers(fields, family, hidden_size),
        "logit_softcap": _softcap(fields, family, "final_logit_softcapping"),
        "layers": family.layers(fields, n_layers, scale),
    }
    _check_unsupported(fields)
    if fields.faults:
        heading = f"Cannot build this {model_type!r} model: config.json has unsupported fields:"
        advice = f"Correct a field that is wrong. If the model needs it: {OTHER_MODELS_ADVICE}"
        kind = ModelError if fields.is_damaged else UnsupportedModelError
        raise kind(gather(fields.faults, heading, advice))
    return DecoderConfig(
        family=model_type,
        hidden_size=hidden_size,
        block=family.block,
        attention=attention,
        feed_forward=feed_forward,
        source=dict(config),
        **parts,
    )


def _find_family(config: dict[str, Any]) -> str:
    model_type, architectures = config.get("model_type"), config.get("architectures")
    by_architecture = {family.architecture: name for name, family in FAMILIES.items()}
    named = str(architectures[0]) if isinstance(architectures, list) and architectures else None
    model_type = model_type if model_type is None else str(model_type)
    if model_type is None and named in by_architecture:
        return by_architecture[named]
    known = sorted(FAMILIES) if model_type is not None or named is None else sorted(by_architecture)
    seen = f"model_type={model_type!r}" if model_type is not None else f"architectures={named!r}"
    if model_type in FAMILIES:
        if named is None or named == FAMILIES[model_type].architecture:
            return model_type
        known, seen = [FAMILIES[model_type].architecture], f"architectures=[{named!r}]"
    near = did_you_mean(model_type or str(named), known)
    kind = ModelError if model_type is None and named is None else UnsupportedModelError
    raise kind(
        f"Cannot build a decoder: config.json says {seen}. Supported: {', '.join(known)}.{near} "
        f"If the model is of another architecture, {OTHER_MODELS_ADVICE}"
    )


def _attention(fields: Fields, family: Family, hidden_size: int, heads: int) -> AttentionConfig:
    from_field = fields.flag("attention_bias") if family.qkv_bias is None else False
    if fields.get("head_dim") is None and hidden_size % heads:
        fields.faults.append(f"hidden size {hidden_size} is not a multiple of {heads} heads")
    return AttentionConfig(
        num_attention_heads=heads,
        num_key_value_heads=fields.count("num_key_value_heads", heads, maximum=MAX_HEADS),
        head_dim=fields.count("head_dim", max(1, hidden_size // heads), maximum=MAX_HEAD_DIM),
        qkv_bias=from_field if family.qkv_bias is None else family.qkv_bias,
        output_bias=from_field or family.block == "gpt2",
        qk_norm=family.qk_norm,
        is_fused=family.is_fused,
        logit_softcap=_softcap(fields, family, "attn_logit_softcapping"),
    )


def _attention_scale(fields: Fields, family: Family, head_dim: int) -> float:
    if "query_pre_attn_scalar" in family.defaults:
        return float(fields.number("query_pre_attn_scalar") ** -0.5)
    if family.has_multipliers:
        return fields.number("attention_multiplier")
    return float(head_dim**-0.5)


def _multipliers(fields: Fields, family: Family, hidden_size: int) -> dict[str, float]:
    if not family.has_multipliers:
        return {"embedding_scale": hidden_size**0.5 if family.embeddings_are_scaled else 1.0}
    return {
        "embedding_scale": fields.number("embedding_multiplier"),
        "residual_multiplier": fields.number("residual_multiplier"),
        "logit_scale": 1 / fields.number("logits_scaling"),
    }


def _softcap(fields: Fields, family: Family, name: str) -> float | None:
    # Absent means transformers' default, null means none.
    if not family.has_softcaps:
        return None
    if fields.values.get(name, 0) is None:
        fields.used.add(name)
        return None
    return fields.number(name)


def _feed_forward(fields: Fields, family: Family, hidden_size: int) -> FeedForwardConfig:
    default = 4 * hidden_size if family.block == "gpt2" else None
    return FeedForwardConfig(
        intermediate_size=fields.count("intermediate_size", default, maximum=MAX_SIZE),
        activation=fields.choice("hidden_act", ACTIVATION_NAMES),
        bias=fields.flag("mlp_bias") if family.mlp_bias is None else family.mlp_bias,
        is_fused=family.is_fused,
    )


def _check_unsupported(fields: Fields) -> None:
    for name, neutral in _NEUTRAL.items():
        value = fields.values.get(name)
        if name not in fields.used and value is not None and value != neutral:
            fields.faults.append(f"{name}={value!r}: not supported for this family")
    kinds = fields.values.get("layer_types")
    if "layer_types" not in fields.used and kinds is not None:
        fields.listed("layer_types", 0, (FULL,))


_LLAMA_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 2048,
}
_QWEN_DEFAULTS = {
    **_LLAMA_DEFAULTS,
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", plain_layers, defaults=_LLAMA_DEFAULTS, mlp_bias=None),
    "mistral": Family(
        "MistralForCausalLM",
        mistral_layers,
        defaults={
            **_LLAMA_DEFAULTS,
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        qkv_bias=False,
    ),
    "qwen2": Family("Qwen2ForCausalLM", qwen_layers, defaults=_QWEN_DEFAULTS, qkv_bias=True),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        qwen_layers,
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        qk_norm="head",
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        smollm3_layers,
        defaults={
            **_LLAMA_DEFAULTS,
            "max_position_embeddings": 32_768,
            "rope_theta": 2_000_000.0,
            "num_key_value_heads": 4,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
        },
        mlp_bias=None,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        phi3_layers,
        defaults={
            **_LLAMA_DEFAULTS,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
        qkv_bias=False,
        is_fused=True,
    ),
    "granite": Family(
        "GraniteForCausalLM",
        plain_layers,
        defaults={
            **_LLAMA_DEFAULTS,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        mlp_bias=None,
        has_multipliers=True,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        plain_layers,
        defaults={**_LLAMA_DEFAULTS, "rms_norm_eps": 1e-5},
        block="post_norm",
        qk_norm="width",
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        olmo3_layers,
        defaults={
            **_LLAMA_DEFAULTS,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "sliding_window": 4096,
        },
        block="post_norm",
        qk_norm="width",
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        gemma2_layers,
        names={"hidden_act": "hidden_activation"},
        defaults={
            "hidden_act": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10_000.0,
            "max_position_embeddings": 8192,
            "head_dim": 256,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
        },
        block="sandwich",
        embeddings_are_scaled=True,
        has_softcaps=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        gemma3_layers,
        names={"hidden_act": "hidden_activation"},
        defaults={
            "hidden_act": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 131_072,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "head_dim": 256,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "tie_word_embeddings": True,
        },
        block="sandwich",
        qk_norm="head",
        embeddings_are_scaled=True,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        gpt2_layers,
        names={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "rms_norm_eps": "layer_norm_epsilon",
            "hidden_act": "activation_function",
        },
        defaults={
            "hidden_act": "gelu_new",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 1024,
            "scale_attn_weights": True,
            "tie_word_embeddings": True,
        },
        block="gpt2",
        qkv_bias=True,
        mlp_bias=True,
    ),
}
"""By model_type."""
