"""config.json → DecoderConfig: both layouts of transformers, and refusals that name the field."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora.decoder.families import FAMILIES, decoder_config
from lora.errors import ModelError
from lora.pretrained.gguf_writer import describe_decoder

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


LONGROPE: dict[str, Any] = {
    "type": "longrope",
    "short_factor": [1.0, 2.0],
    "long_factor": [1.5, 4.0],
}


def config_of(family: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": family, **SIZES, **fields}


def test_sizes_are_read() -> None:
    config = decoder_config(config_of("llama", rms_norm_eps=1e-5, tie_word_embeddings=True))
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (100, 64, 96)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)
    assert (config.num_hidden_layers, config.norm_eps) == (6, 1e-5)
    assert config.tie_word_embeddings
    assert config.layers[0].scale == 16**-0.5


def test_absent_fields_take_transformers_defaults() -> None:
    config = decoder_config(config_of("llama"))
    assert (config.norm_eps, config.tie_word_embeddings) == (1e-6, False)
    assert config.layers[0].rope is not None
    assert config.layers[0].rope.rope_theta == 10_000.0
    assert decoder_config(config_of("smollm3")).tie_word_embeddings
    assert decoder_config(config_of("mistral")).layers[0].window_tokens == 4096
    assert decoder_config(config_of("mistral", sliding_window=None)).layers[0].window_tokens is None


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_defaults_are_those_of_transformers(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    names = FAMILIES[family].names
    given = {**SIZES, "num_attention_heads": 32}
    del given["num_key_value_heads"]
    absent = {"model_type": family, **{names.get(k, k): value for k, value in given.items()}}
    filled = transformers.AutoConfig.for_model(**absent).to_dict()
    assert decoder_config(absent) == decoder_config(filled)


def test_layout_of_version_4_equals_that_of_version_5() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    older = decoder_config(config_of("llama", rope_theta=500_000.0, rope_scaling=scaling))
    newer = config_of("llama", rope_parameters={"rope_theta": 500_000.0, **scaling})
    assert older == decoder_config(newer)
    rope = older.layers[0].rope
    assert rope is not None
    assert (rope.rope_type, rope.rope_theta, rope.factor) == ("llama3", 500_000.0, 32.0)


def test_the_older_name_of_the_rope_type() -> None:
    config = decoder_config(config_of("llama", rope_scaling={"type": "linear", "factor": 2.0}))
    assert config.layers[0].rope is not None
    assert config.layers[0].rope.rope_type == "linear"


def test_gemma3_layouts_agree() -> None:
    linear = {"rope_type": "linear", "factor": 8.0}
    older = config_of(
        "gemma3_text",
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling=linear,
        sliding_window=512,
        sliding_window_pattern=3,
    )
    newer = config_of(
        "gemma3_text",
        sliding_window=512,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "full_attention": {"rope_theta": 1e6, **linear},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
    )
    config = decoder_config(older)
    assert config == decoder_config(newer)
    windows = [layer.window_tokens for layer in config.layers]
    assert windows == [512, 512, None] * 2
    assert config.layers[0].scale == 256**-0.5
    assert config.embedding_scale == 8.0


def test_yarns_attention_factor() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    rope = decoder_config(config_of("qwen3", rope_scaling=yarn)).layers[0].rope
    assert rope is not None
    assert rope.attention_factor == pytest.approx(1.1386294)
    given = {**yarn, "attention_factor": 1.5}
    rope = decoder_config(config_of("qwen3", rope_scaling=given)).layers[0].rope
    assert rope is not None
    assert rope.attention_factor == 1.5


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_phi3s_longrope(kind: str) -> None:
    """As Phi-3.5 and Phi-4-mini have it: the context lengths are beside the factors."""
    fields = {
        "max_position_embeddings": 131_072,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.25,
        "rope_scaling": {**LONGROPE, "type": kind},
        "sliding_window": 262_144,
    }
    config = decoder_config(config_of("phi3", **fields))
    rope = config.layers[0].rope
    assert rope is not None
    assert (rope.rope_type, rope.rotary_dim) == ("longrope", 4)
    assert (rope.short_factor, rope.long_factor) == ((1.0, 2.0), (1.5, 4.0))
    assert rope.attention_factor == pytest.approx((1 + 5 / 12) ** 0.5)
    assert config.longrope_tokens == 4096
    assert (config.attention.is_fused, config.feed_forward.is_fused) == (True, True)
    assert config.layers[0].window_tokens == 262_144


PUBLISHED: dict[str, dict[str, Any]] = {
    "Phi-3-mini-4k": {
        "architectures": ["Phi3ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "attention_bias": False,
        "embd_pdrop": 0.0,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "model_type": "phi3",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
        "vocab_size": 32064,
    },
    "Phi-4-mini": {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "full_attn_mod": 1,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "phi3",
        "num_attention_heads": 24,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "long_factor": [1 + i / 4 for i in range(48)],
            "short_factor": [1.0] * 48,
            "type": "longrope",
        },
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "vocab_size": 200064,
    },
    "granite-3.3-2b": {
        "architectures": ["GraniteForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "logits_scaling": 8.0,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "granite",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000000.0,
        "tie_word_embeddings": True,
        "vocab_size": 49159,
    },
    "Olmo-3-7B": {
        "architectures": ["Olmo3ForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
        "max_position_embeddings": 65536,
        "model_type": "olmo3",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "yarn",
        },
        "rope_theta": 500000,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 100278,
    },
    "gemma-2-27b": {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": 128,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": 32,
        "num_hidden_layers": 46,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 144,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
}
"""The content of config.json, in the layouts in which these models were published."""


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_models_are_read_as_transformers_reads_them(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    given = {key: value for key, value in PUBLISHED[name].items() if key != "auto_map"}
    filled = transformers.AutoConfig.for_model(**copy.deepcopy(given)).to_dict()
    config = decoder_config(PUBLISHED[name])
    assert config == decoder_config(filled)
    assert describe_decoder(config) if name != "Phi-3-mini-4k" else config.layers[0].window_tokens


def test_a_window_that_is_null_is_none() -> None:
    for family in ("qwen2", "phi3"):
        fields = {"use_sliding_window": True, "max_window_layers": 2} if family == "qwen2" else {}
        config = decoder_config(config_of(family, sliding_window=None, **fields))
        assert {layer.window_tokens for layer in config.layers} == {None}


def test_granites_multipliers() -> None:
    fields = {"embedding_multiplier": 12, "logits_scaling": 8, "residual_multiplier": 0.22}
    config = decoder_config(config_of("granite", attention_multiplier=0.015625, **fields))
    assert (config.embedding_scale, config.logit_scale) == (12.0, 0.125)
    assert (config.residual_multiplier, config.layers[0].scale) == (0.22, 0.015625)


def test_gemma2_caps_by_default_and_not_where_the_field_is_null() -> None:
    config = decoder_config(config_of("gemma2"))
    assert (config.attention.logit_softcap, config.logit_softcap) == (50.0, 30.0)
    assert [layer.window_tokens for layer in config.layers] == [4096, None] * 3
    given = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = decoder_config(config_of("gemma2", **given))
    assert (config.attention.logit_softcap, config.logit_softcap) == (None, None)


def test_smollm3_blocks_without_rope() -> None:
    config = decoder_config(config_of("smollm3", no_rope_layers=[1, 0, 1, 1, 1, 0]))
    assert [layer.rope is None for layer in config.layers] == [
        False,
        True,
        False,
        False,
        False,
        True,
    ]


def test_an_unknown_model_type_says_what_is_supported() -> None:
    with pytest.raises(ModelError) as error:
        decoder_config(config_of("mistrel"))
    message = str(error.value)
    assert "model_type='mistrel'" in message
    assert ", ".join(sorted(FAMILIES)) in message
    assert "Did you mean 'mistral'?" in message
    assert "--implementation transformers" in message


def test_an_architecture_counts_where_the_model_type_is_absent() -> None:
    config = {"architectures": ["Qwen2ForCausalLM"], **SIZES}
    assert decoder_config(config).family == "qwen2"
    with pytest.raises(ModelError, match="architectures='MambaForCausalLM'"):
        decoder_config({"architectures": ["MambaForCausalLM"], **SIZES})
    with pytest.raises(ModelError, match="architectures=None"):
        decoder_config(SIZES)


def test_a_classifier_is_refused() -> None:
    config = config_of("llama", architectures=["LlamaForSequenceClassification"])
    with pytest.raises(ModelError, match=r"LlamaForSequenceClassification.*LlamaForCausalLM"):
        decoder_config(config)


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ("llama", {"rope_scaling": {"rope_type": "su"}}, "allowed: default, linear"),
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "short_factor is missing"),
        ("phi3", {"rope_scaling": {**LONGROPE, "long_factor": [1, 0]}}, "long_factor=[1, 0]"),
        ("phi3", {"rope_scaling": {**LONGROPE, "short_factor": 2}}, "short_factor=2: allowed"),
        ("phi3", {"rope_scaling": {**LONGROPE, "mscale_all": 2}}, "rope_scaling.mscale_all=2"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor=0"),
        ("phi3", {"partial_rotary_factor": "half"}, "partial_rotary_factor='half'"),
        ("phi3", {"attention_bias": True}, "attention_bias=True"),
        ("phi3", {"layer_types": ["sliding_attention"] * 6}, "layer_types"),
        ("granite", {"logits_scaling": 0}, "logits_scaling=0: allowed"),
        ("granite", {"attention_multiplier": "x"}, "attention_multiplier='x'"),
        ("granite", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("granite", {"sliding_window": 8}, "sliding_window=8"),
        ("olmo2", {"mlp_bias": True}, "mlp_bias=True"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ("olmo2", {"sliding_window": 8}, "sliding_window=8"),
        ("olmo3", {"rope_theta": 1e4}, "rope_theta=10000.0: allowed: in rope_parameters"),
        ("gemma2", {"sliding_window": None}, "sliding_window=None: allowed: an int"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": -1}}, "factor=-1"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ("llama", {"rope_parameters": {"rope_theta": "big"}}, "rope_theta='big'"),
        ("llama", {"rope_parameters": {"mrope_section": [1, 2]}}, "mrope_section"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"hidden_act": "mish"}, "hidden_act='mish': allowed: silu"),
        ("llama", {"sliding_window": 128}, "sliding_window=128"),
        ("llama", {"layer_types": ["sliding_attention"] * 6}, "layer_types"),
        ("llama", {"vocab_size": None}, "vocab_size is missing"),
        ("llama", {"hidden_size": 64.5}, "hidden_size=64.5"),
        ("llama", {"num_attention_heads": True}, "num_attention_heads=True"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
        ("mistral", {"attention_bias": True}, "attention_bias=True"),
        ("mistral", {"layer_types": ["full_attention"] * 6}, "each 'sliding_attention'"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias=True"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 6}, "each 'full_attention'"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": "2"}, "max_window_layers='2'"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers=[1, 0]"),
        ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping=-1.0: allowed"),
        ("gemma2", {"attn_logit_softcapping": "no"}, "attn_logit_softcapping='no': allowed"),
        ("gemma2", {"rope_local_base_freq": 1e4}, "rope_local_base_freq"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1.0}}, "rope_parameters=['rope_theta']"),
        ("gemma3_text", {"rope_parameters": [1]}, "rope_parameters=[1]"),
        ("gemma3_text", {"rope_scaling": True}, "rope_scaling=True"),
    ],
)
def test_what_changes_the_result_is_refused_by_name(
    family: str, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelError) as error:
        decoder_config(config_of(family, **fields))
    assert words in str(error.value)


def test_neutral_values_pass() -> None:
    neutral = {
        "final_logit_softcapping": None,
        "mlp_bias": False,
        "rope_interleaved": False,
        "partial_rotary_factor": 1,
        "layer_types": ["full_attention"] * 6,
        "pretraining_tp": 2,
        "attention_dropout": 0.1,
        "transformers.js_config": {"dtype": "q4"},
    }
    assert decoder_config(config_of("llama", **neutral)) == decoder_config(config_of("llama"))


def test_all_faults_are_raised_together() -> None:
    with pytest.raises(ModelError) as error:
        decoder_config(config_of("llama", hidden_act="mish", vocab_size=0, sliding_window=3))
    for word in ("hidden_act", "vocab_size", "sliding_window", "transformers"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.2}, "3 of 16 dimensions"),
        ({"model_type": "phi3", "partial_rotary_factor": 1.5}, "24 of 16 dimensions"),
        ({"model_type": "phi3", "rope_scaling": LONGROPE}, "short_factor has 2 values: 8"),
        ({"num_attention_heads": 5}, "not a multiple of 5 heads"),
    ],
)
def test_sizes_must_fit(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError) as error:
        decoder_config(config_of("llama", **fields))
    assert words in str(error.value)


def test_gpt2_shares_no_heads_and_fills_its_width() -> None:
    sizes = {"model_type": "gpt2", "vocab_size": 9, "n_embd": 32, "n_layer": 1, "n_head": 4}
    assert decoder_config(sizes).intermediate_size == 128
    with pytest.raises(ModelError, match="num_key_value_heads=2: GPT-2 has no grouped-query heads"):
        decoder_config({**sizes, "num_key_value_heads": 2})
    with pytest.raises(ModelError, match="hidden size 32 is not heads · head width = 64"):
        decoder_config({**sizes, "head_dim": 16})


def test_gpt2_is_refused_what_its_modules_do_not_compute() -> None:
    sizes = {"model_type": "gpt2", "vocab_size": 9, "n_embd": 32, "n_layer": 1, "n_head": 4}
    config = decoder_config(sizes)
    capped = replace(config.attention, qk_norm="head", logit_softcap=5.0)
    with pytest.raises(ModelError) as error:
        replace(config, attention=capped, residual_multiplier=0.5, embedding_scale=2.0)
    for name in ("norms of queries", "a cap of the attention", "embeddings", "residual branches"):
        assert name in str(error.value)


def test_the_source_is_kept_whole(tmp_path: Path) -> None:
    source = config_of("llama", something_of_the_authors={"a": 1})
    kept = decoder_config(source).source
    assert kept == source
    assert json.loads(json.dumps(kept)) == source


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rms_norm_eps": 10**400}, r"rms_norm_eps=10{199}…: allowed: a finite number > 0"),
        ({"rope_theta": 10**400}, r"rope_theta=10"),
        ({"hidden_size": 10**400}, r"hidden_size=10{199}…: allowed: at most"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope_type=\['yarn'\]: allowed: default"),
        ({"rope_scaling": {"rope_type": {}}}, r"rope_type={}: allowed: default"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 10**400}}, r"factor=10"),
        (
            {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": "x"}},
            r"original_max_position_embeddings='x': allowed",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn"}, "max_position_embeddings": 10**400},
            r"max_position_embeddings=10",
        ),
    ],
)
def test_values_beyond_a_float_or_of_another_type_are_refused_in_words(
    fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        decoder_config(config_of("llama", **fields))
    assert len(str(caught.value)) < 3000
