"""A small Llama of the sizes that a test is about, and one with random values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lora.decoder.config import (
    AttentionConfig,
    DecoderConfig,
    FeedForwardConfig,
    LayerConfig,
    QkNorm,
    RopeConfig,
)
from lora.decoder.decoder import Decoder, build_decoder

VOCABULARY = 97
ROPE = RopeConfig(1e4)


def llama_config(
    *,
    vocab_size: int = VOCABULARY,
    hidden_size: int = 48,
    heads: tuple[int, int, int] = (6, 2, 8),
    feed_forward: int = 56,
    n_layers: int = 2,
    max_position_embeddings: int = 256,
    tied: bool = True,
    bias: bool = False,
) -> DecoderConfig:
    """Return the config; `heads` are query heads, key/value heads and the width of each."""
    return DecoderConfig(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        max_position_embeddings=max_position_embeddings,
        norm_eps=1e-5,
        block="pre_norm",
        embedding_scale=1.0,
        tie_word_embeddings=tied,
        attention=AttentionConfig(*heads, qkv_bias=bias),
        feed_forward=FeedForwardConfig(feed_forward, "silu"),
        layers=(LayerConfig(ROPE, None, heads[2] ** -0.5),) * n_layers,
    )


def changed(
    config: DecoderConfig, *, qk_norm: QkNorm | None = None, **changes: Any
) -> DecoderConfig:
    """Return `config` with these fields, and norms of queries and keys."""
    attention = replace(changes.pop("attention", config.attention), qk_norm=qk_norm)
    return replace(config, attention=attention, **changes)


def random_decoder(config: DecoderConfig, dtype: torch.dtype) -> Decoder:
    """Return a decoder with all tensors random, norms and biases too, the same each time."""
    model = build_decoder(config, 1, dtype=dtype)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.add_(0.2 * noise)
    return model
