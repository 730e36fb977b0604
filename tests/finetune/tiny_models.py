"""Folders of tiny models, one of each kind of family, for tests of sharded training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lora.decoder.decoder import Decoder, build_decoder
from lora.decoder.families import decoder_config
from lora.pretrained.hf_weights import save_decoder

VOCAB = 50
"""Not a multiple of 3: three processes get uneven shares of the rows."""
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_SIZES, "model_type": "llama", "attention_bias": True},
    "tied": {**_SIZES, "model_type": "llama", "tie_word_embeddings": True},
    "qwen3": {**_SIZES, "model_type": "qwen3", "tie_word_embeddings": True},
    "gemma3": {
        **_SIZES,
        "model_type": "gemma3_text",
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 512,
    },
}


def build_tiny(family: str, **changes: Any) -> Decoder:
    """Return a model of `family` with random values, biases and norms too."""
    model = build_decoder(decoder_config({**FAMILIES[family], **changes}), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def save_tiny(folder: Path, family: str, **changes: Any) -> Path:
    """Write a model of `family` into `folder`, and return it."""
    save_decoder(build_tiny(family, **changes), folder)
    return folder
