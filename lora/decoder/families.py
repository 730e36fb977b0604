"""The supported families as small deltas, and config.json → DecoderConfig.

A family is a row of `FAMILIES`: what its fields are called, what transformers takes where one is
absent, and where it departs from Llama. Fields that change the result and that we do not compute
are refused by name. Known and left out: dropout in training (LoRA has its own), token ids,
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
    RopeConfig,
)
from lora.decoder.fields import MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_SIZE, Fields, read_rope
from lora.errors import ModelError, did_you_mean, gather

ACTIVATION_NAMES = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
_FULL, _SLIDING = "full_attention", "sliding_attention"

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
    "quantization_config": None,
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
"""Fields that change the result, with the value at which they do not; checked where the family
does not read them."""


@dataclass(frozen=True)
class Family:
    """One row: how a family departs from Llama."""

    architecture: str
    """Class name in `architectures`."""
    layers: Callable[[Fields, int, float], tuple[LayerConfig, ...]]
    """(fields, number of layers, scale of the attention logits) -> the blocks."""
    names: dict[str, str] = field(default_factory=dict)
    """Our names of fields -> the family's own."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """What transformers takes where a field is absent, by our names."""
    block: BlockKind = "pre_norm"
    qkv_bias: bool | None = None
    """None: the field attention_bias decides, for the output projection too."""
    mlp_bias: bool | None = False
    """None: the field mlp_bias decides."""
    qk_norm: bool = False
    embeddings_are_scaled: bool = False


def decoder_config(config: dict[str, Any]) -> DecoderConfig:
    """Return what the contents of a config.json describe (transformers 4 and 5 layouts).

    Raises ModelError for an architecture that is not supported, and one ModelError that lists
    every field that is missing, out of range, or changes the result in a way we do not compute.
    """
    model_type = _find_family(config)
    family = FAMILIES[model_type]
    fields = Fields(config, family.names, family.defaults)
    hidden_size = fields.count("hidden_size", most=MAX_SIZE)
    heads = fields.count("num_attention_heads", most=MAX_HEADS)
    attention = _attention(fields, family, hidden_size, heads)
    feed_forward = _feed_forward(fields, family, hidden_size)
    scale = attention.head_dim**-0.5
    if "query_pre_attn_scalar" in family.defaults:
        scale = fields.number("query_pre_attn_scalar") ** -0.5
    n_layers = fields.count("num_hidden_layers", most=MAX_LAYERS)
    parts: dict[str, Any] = {
        "vocab_size": fields.count("vocab_size", most=MAX_SIZE),
        "max_position_embeddings": fields.count("max_position_embeddings"),
        "norm_eps": fields.number("rms_norm_eps"),
        "tie_word_embeddings": fields.flag("tie_word_embeddings"),
        "layers": family.layers(fields, n_layers, scale),
    }
    _note_unsupported(fields)
    if fields.faults:
        heading = f"config.json of a {model_type!r} model has fields that cannot be honoured:"
        advice = (
            "Nothing was ignored. Correct the field if it is wrong; if the model does need it, "
            "load it with transformers and adapt the object with lora.apply_lora(model, config)."
        )
        raise ModelError(gather(fields.faults, heading, advice))
    return DecoderConfig(
        family=model_type,
        hidden_size=hidden_size,
        block=family.block,
        embedding_scale=hidden_size**0.5 if family.embeddings_are_scaled else 1.0,
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
    raise ModelError(
        f"A decoder was asked for, and config.json says {seen}. Supported here: "
        f"{', '.join(known)}.{near} A model of another architecture can be loaded with "
        "transformers and adapted in Python: lora.apply_lora(model, LoRAConfig())."
    )


def _attention(fields: Fields, family: Family, hidden_size: int, heads: int) -> AttentionConfig:
    from_field = fields.flag("attention_bias") if family.qkv_bias is None else False
    if fields.get("head_dim") is None and hidden_size % heads:
        fields.faults.append(f"hidden size {hidden_size} is not a multiple of {heads} heads")
    return AttentionConfig(
        num_attention_heads=heads,
        num_key_value_heads=fields.count("num_key_value_heads", heads, most=MAX_HEADS),
        head_dim=fields.count("head_dim", max(1, hidden_size // heads), most=MAX_HEAD_DIM),
        qkv_bias=from_field if family.qkv_bias is None else family.qkv_bias,
        output_bias=from_field or family.block == "gpt2",
        qk_norm=family.qk_norm,
    )


def _feed_forward(fields: Fields, family: Family, hidden_size: int) -> FeedForwardConfig:
    widest = 4 * hidden_size if family.block == "gpt2" else None
    return FeedForwardConfig(
        intermediate_size=fields.count("intermediate_size", widest, most=MAX_SIZE),
        activation=fields.choice("hidden_act", ACTIVATION_NAMES),
        bias=fields.flag("mlp_bias") if family.mlp_bias is None else family.mlp_bias,
    )


def _note_unsupported(fields: Fields) -> None:
    for name, neutral in _NEUTRAL.items():
        value = fields.values.get(name)
        if name not in fields.used and value is not None and value != neutral:
            why = "not supported for this family"
            if name == "quantization_config":
                why = "quantised weights are not read; take the model that is not, or a GGUF file"
            fields.faults.append(f"{name}={value!r}: {why}")
    kinds = fields.values.get("layer_types")
    if "layer_types" not in fields.used and kinds is not None:
        fields.listed("layer_types", 0, (_FULL,))


def _one_rope(fields: Fields) -> RopeConfig:
    """Return the one rope of all blocks, from transformers 5's field or from 4's two."""
    theta = fields.number("rope_theta")
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    return read_rope(fields, name, fields.get(name) or {}, theta)


def _plain_layers(fields: Fields, n_layers: int, scale: float) -> tuple[LayerConfig, ...]:
    return (LayerConfig(_one_rope(fields), None, scale),) * n_layers


def _mistral_layers(fields: Fields, n_layers: int, scale: float) -> tuple[LayerConfig, ...]:
    has_null = fields.values.get("sliding_window", 0) is None  # absent is not null: it means 4096
    window = None if has_null else fields.count("sliding_window")
    fields.used.add("sliding_window")
    kind = _FULL if window is None else _SLIDING
    fields.listed("layer_types", n_layers, (kind,))  # all blocks are of one kind
    return (LayerConfig(_one_rope(fields), window, scale),) * n_layers


def _windows_by_type(fields: Fields, n_layers: int, kinds: list[str]) -> list[int | None]:
    kinds = fields.listed("layer_types", n_layers, (_FULL, _SLIDING)) or kinds
    if _SLIDING not in kinds:
        fields.get("sliding_window")  # read, and without effect
        return [None] * n_layers
    window = fields.count("sliding_window")
    return [window if kind == _SLIDING else None for kind in kinds]


def _qwen_layers(fields: Fields, n_layers: int, scale: float) -> tuple[LayerConfig, ...]:
    first = n_layers
    if fields.flag("use_sliding_window"):
        first = fields.count("max_window_layers", least=0)
    kinds = [_SLIDING if i >= first else _FULL for i in range(n_layers)]
    if not fields.flag("use_sliding_window"):  # then transformers drops the window altogether
        fields.get("sliding_window")
        fields.listed("layer_types", n_layers, (_FULL,))
        windows: list[int | None] = [None] * n_layers
    else:
        windows = _windows_by_type(fields, n_layers, kinds)
    rope = _one_rope(fields)
    return tuple(LayerConfig(rope, window, scale) for window in windows)


def _smollm3_layers(fields: Fields, n_layers: int, scale: float) -> tuple[LayerConfig, ...]:
    every = fields.count("no_rope_layer_interval")
    have_rope = fields.listed("no_rope_layers", n_layers, (0, 1))
    have_rope = have_rope or [int((i + 1) % every != 0) for i in range(n_layers)]
    windowed = fields.flag("use_sliding_window") and fields.get("sliding_window") is not None
    kinds = [_SLIDING if windowed and not has else _FULL for has in have_rope]
    windows = _windows_by_type(fields, n_layers, kinds)
    rope = _one_rope(fields)
    return tuple(
        LayerConfig(rope if has else None, window, scale)
        for has, window in zip(have_rope, windows, strict=True)
    )


def _gemma3_layers(fields: Fields, n_layers: int, scale: float) -> tuple[LayerConfig, ...]:
    pattern = fields.count("sliding_window_pattern")
    kinds = [_SLIDING if (i + 1) % pattern else _FULL for i in range(n_layers)]
    windows = _windows_by_type(fields, n_layers, kinds)
    thetas = {_FULL: fields.number("rope_theta"), _SLIDING: fields.number("rope_local_base_freq")}
    nested = fields.get("rope_parameters") or {}
    if not isinstance(nested, dict):
        fields.fault("rope_parameters", nested, "an object")
        nested = {}
    scaling = fields.get("rope_scaling")  # of version 4: for the global layers only
    ropes = {}
    for kind, theta in thetas.items():
        parameters = nested.get(kind) or {}
        if scaling and kind == _FULL:
            parameters = {**parameters, **scaling}
        ropes[kind] = read_rope(fields, f"rope_parameters.{kind}", parameters, theta)
    unknown = sorted(set(nested) - set(thetas))
    if unknown:
        fields.fault("rope_parameters", unknown, f"one object for {_FULL} and one for {_SLIDING}")
    return tuple(
        LayerConfig(ropes[_FULL if window is None else _SLIDING], window, scale)
        for window in windows
    )


def _gpt2_layers(fields: Fields, n_layers: int, scale: float) -> tuple[LayerConfig, ...]:
    if not fields.flag("scale_attn_weights"):
        scale = 1.0
    by_depth = fields.flag("scale_attn_by_inverse_layer_idx")
    return tuple(
        LayerConfig(None, None, scale / (i + 1) if by_depth else scale) for i in range(n_layers)
    )


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
    "llama": Family("LlamaForCausalLM", _plain_layers, defaults=_LLAMA_DEFAULTS, mlp_bias=None),
    "mistral": Family(
        "MistralForCausalLM",
        _mistral_layers,
        defaults={
            **_LLAMA_DEFAULTS,
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        qkv_bias=False,
    ),
    "qwen2": Family("Qwen2ForCausalLM", _qwen_layers, defaults=_QWEN_DEFAULTS, qkv_bias=True),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _qwen_layers,
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        qk_norm=True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        _smollm3_layers,
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
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _gemma3_layers,
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
        qk_norm=True,
        embeddings_are_scaled=True,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        _gpt2_layers,
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
