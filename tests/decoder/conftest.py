"""Tiny models of transformers, every tensor random, beside the same model as we load it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora.decoder.decoder import Decoder
from lora.pretrained.hf_weights import load_decoder

VOCAB = 97
LLAMA_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
}
_GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
_GEMMA3_KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
_OLMO3_ROPES = {
    "full_attention": _YARN,
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}


def _longrope(original: int, width: int) -> dict[str, Any]:
    steps = [i / width for i in range(width // 2)]
    return {
        "original_max_position_embeddings": original,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "short_factor": [1 + step for step in steps],
            "long_factor": [3 + 8 * step for step in steps],
        },
    }


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-biases": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 8},
    ),
    "llama3": ("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": _LLAMA3}),
    "llama-yarn": ("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": _YARN}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 7}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"no_rope_layer_interval": 2}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"sliding_window": 7}),
    "phi3-partial": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            "head_dim": 24,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_theta": 50.0, "partial_rotary_factor": 0.75},
        },
    ),
    "phi3-longrope": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {"hidden_size": 192, "num_attention_heads": 2, "num_hidden_layers": 2, **_longrope(32, 96)},
    ),
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        {
            "attention_bias": True,
            "tie_word_embeddings": True,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.4,
            "logits_scaling": 5.0,
        },
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "olmo2-biases": (
        "Olmo2Config",
        "Olmo2ForCausalLM",
        {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "olmo3": (
        "Olmo3Config",
        "Olmo3ForCausalLM",
        {"sliding_window": 6, "layer_types": _GEMMA3_KINDS, "rope_parameters": _OLMO3_ROPES},
    ),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
            "attn_implementation": "eager",  # transformers' others do not cap
        },
    ),
    "gemma2-uncapped": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "head_dim": 24,
            "sliding_window": 64,
            "attention_bias": True,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 20,
            "layer_types": _GEMMA3_KINDS,
            "rope_parameters": _GEMMA3_ROPES,
        },
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
    "gpt2-scaled": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"scale_attn_by_inverse_layer_idx": True, "n_inner": 60, "tie_word_embeddings": False},
    ),
}
"""Name -> transformers' config class, model class, and what differs from the sizes above."""
LONG_CASE = (
    "Phi3Config",
    "Phi3ForCausalLM",
    {"partial_rotary_factor": 0.5, **_longrope(9, 6)},
)
"""Rotates documents of more than 9 tokens otherwise than shorter ones."""


@dataclass
class Pair:
    """The same weights twice: transformers' model and ours, loaded from `folder`."""

    reference: Any
    ours: Decoder
    folder: Path


def build_reference(name: str, **overrides: Any) -> Any:
    """Return transformers' model of case `name`, in eval mode, every tensor random."""
    transformers = pytest.importorskip("transformers")
    config_class, model_class, differences = LONG_CASE if name == "long" else CASES[name]
    sizes = GPT2_SIZES if name.startswith("gpt2") else LLAMA_SIZES
    config = getattr(transformers, config_class)(**{**sizes, **differences, **overrides})
    model = getattr(transformers, model_class)(config).eval()
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter of `model` random values, norm weights and biases too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.normal_(0.5, 0.5, generator=generator)
        else:
            parameter.normal_(0.0, 0.15, generator=generator)


@pytest.fixture(scope="session")
def build_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """Return a function: case name (and overrides of its config) -> Pair."""
    made: dict[str, Pair] = {}

    def build(name: str, **overrides: Any) -> Pair:
        key = f"{name} {overrides}"
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            reference = build_reference(name, **overrides)
            reference.save_pretrained(folder)
            made[key] = Pair(reference, load_decoder(folder), folder)
        return made[key]

    return build


@pytest.fixture
def make_ids() -> Callable[..., torch.Tensor]:
    """Return a function: rows, tokens -> random token ids, the same in every call."""

    def make(rows: int, n_tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        return torch.randint(3, VOCAB, (rows, n_tokens), generator=generator)

    return make


@pytest.fixture(params=list(CASES))
def pair(request: pytest.FixtureRequest, build_pair: Callable[..., Pair]) -> Pair:
    """One case after the other; shared, so a test must leave the weights alone."""
    return build_pair(request.param)
