"""The tiny model that memory is planned for."""

from __future__ import annotations

from lora.decoder.config import (
    AttentionConfig,
    DecoderConfig,
    FeedForwardConfig,
    LayerConfig,
    RopeConfig,
)

TINY = DecoderConfig(
    family="llama",
    vocab_size=300,
    hidden_size=32,
    max_position_embeddings=256,
    norm_eps=1e-5,
    block="pre_norm",
    embedding_scale=1.0,
    tie_word_embeddings=True,
    attention=AttentionConfig(4, 2, 8),
    feed_forward=FeedForwardConfig(48, "silu"),
    layers=(LayerConfig(RopeConfig(1e4), None, 8**-0.5),) * 2,
)
