"""Random models of a shape, and the batches that they train on."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lora.config import BaseWeights
from lora.data.sequences.batches import BatchStream, build_sequences
from lora.data.sequences.documents import Documents
from lora.decoder.config import (
    AttentionConfig,
    DecoderConfig,
    FeedForwardConfig,
    LayerConfig,
    RopeConfig,
)
from lora.decoder.decoder import Decoder, assign_parameters, build_empty_decoder
from lora.decoder.families import decoder_config
from lora.decoder.quantised.base import QuantisedWeight
from lora.device import WHOLE, Share
from lora.layers.quantised_model import use_quantised_linears
from one_gpu.cases import Shape


def build_empty(shape: Shape) -> Decoder:
    """Return a decoder of this shape on the meta device."""
    if shape.config is not None:
        return build_empty_decoder(decoder_config(shape.config))
    layer = LayerConfig(RopeConfig(10000.0), None, shape.head_dim**-0.5)
    config = DecoderConfig(
        family="llama",
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        max_position_embeddings=max(4096, shape.tokens),
        norm_eps=1e-5,
        block="pre_norm",
        embedding_scale=1.0,
        tie_word_embeddings=shape.tied,
        attention=AttentionConfig(shape.heads, shape.shared, shape.head_dim),
        feed_forward=FeedForwardConfig(shape.feed_forward, "silu"),
        layers=(layer,) * shape.layers,
    )
    return build_empty_decoder(config)


def build_model(
    shape: Shape,
    dtype: torch.dtype,
    *,
    base: BaseWeights = BaseWeights(),  # noqa: B008
    device: str = "cuda",
) -> Decoder:
    """Return a decoder of this shape with random values, its frozen weights stored as `base` says.

    Each weight is drawn, quantised and dropped before the next.
    """
    model = build_empty(shape)
    draw = torch.Generator(device).manual_seed(0)

    def value(size: torch.Size) -> torch.Tensor:
        if len(size) == 1:
            return torch.ones(size, dtype=dtype, device=device)
        return torch.randn(size, dtype=dtype, device=device, generator=draw).mul_(0.02)

    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    use_quantised_linears(model, base)

    def values() -> Iterator[tuple[str, torch.Tensor]]:
        for name in [name for name, _ in model.named_parameters()]:
            owner = model.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, QuantisedWeight) and name.endswith("weight"):
                owner.load(value(sizes[name]), name)
            else:
                yield name, value(sizes[name])

    assign_parameters(model, values())
    return model


def build_stream(
    shape: Shape,
    device: torch.device | str,
    *,
    packed: bool,
    share: Share = WHOLE,
    n_batches: int = 64,
) -> BatchStream:
    """Return the real loader over random tokens: one document per sequence, or packed ones.

    The shape's sequences are those of each process. With one batch it is that of every step.
    """
    import numpy as np

    draw = np.random.default_rng(0)
    n_rows = n_batches * shape.rows * share.size
    if packed:
        lengths = draw.integers(40, 400, n_rows * shape.tokens // 200)
    else:
        lengths = np.full(n_rows, shape.tokens)
    starts = np.concatenate(([0], lengths.cumsum()))
    ids = draw.integers(0, shape.vocabulary, starts[-1]).astype(np.int32)
    labels = np.roll(ids, -1)
    documents = Documents(ids, labels, starts, np.arange(len(lengths)))
    rows = build_sequences(documents, shape.tokens, packing=packed, pad_id=0, seed=0)
    return BatchStream(rows, shape.rows * share.size, 0, device, share)
