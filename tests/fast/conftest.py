"""Tiny decoders and batches for tests of the hand-written step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lora.data.sequences.batches import Batch
from lora.decoder.config import (
    AttentionConfig,
    DecoderConfig,
    FeedForwardConfig,
    LayerConfig,
    RopeConfig,
)
from lora.decoder.decoder import Decoder, build_decoder

ROWS, TOKENS, VOCABULARY = 2, 16, 97


@pytest.fixture
def tiny_decoder() -> Callable[..., Decoder]:
    """Make a random Llama with all tensors drawn; its second block has no rotary embedding."""

    def make(
        *,
        tied: bool = True,
        bias: bool = False,
        window: int | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Decoder:
        rope = RopeConfig(10000.0)
        ropes = (rope, None, rope)
        config = DecoderConfig(
            family="llama",
            vocab_size=VOCABULARY,
            hidden_size=48,
            max_position_embeddings=256,
            norm_eps=1e-5,
            block="pre_norm",
            embedding_scale=1.0,
            tie_word_embeddings=tied,
            attention=AttentionConfig(6, 2, 8, qkv_bias=bias),
            feed_forward=FeedForwardConfig(56, "silu"),
            layers=tuple(LayerConfig(own, window, 8**-0.5) for own in ropes),
        )
        model = build_decoder(config, 1, dtype=dtype)
        draw = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                parameter.add_(0.2 * noise)
        return model

    return make


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """Make a batch of random tokens: one document a sequence, or packed ones with padding."""

    def make(seed: int, *, packed: bool) -> Batch:
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=draw)
        labels = ids.roll(-1, 1)
        labels[:, ::5] = -100
        documents = torch.zeros_like(ids)
        positions = torch.arange(TOKENS).expand(ROWS, -1).clone()
        if packed:
            documents[0, 5:12], documents[0, 12:], documents[1, 13:] = 1, 2, -1
            positions[0, 5:12], positions[0, 12:] = torch.arange(7), torch.arange(4)
            labels[1, 13:] = -100
        return Batch(ids, labels, positions, documents)

    return make
