"""A tiny model with a token for each byte, for tests of what it answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lora.data.tokenizers.subword import TextTokenizer
from lora.decoder.decoder import Decoder, build_decoder
from lora.decoder.families import decoder_config


@pytest.fixture
def byte_tokenizer() -> Callable[[str], TextTokenizer]:
    """Return a function: chat template → a tokenizer with a token for each byte."""

    def build(template: str) -> TextTokenizer:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        return TextTokenizer(backend, chat_template=template)

    return build


@pytest.fixture
def byte_model(fill_random: Callable[..., Any]) -> Callable[[int], Decoder]:
    """Return a function: number of layers → a model for the 256 tokens of `byte_tokenizer`."""

    def build(n_layers: int) -> Decoder:
        config = {
            "model_type": "llama",
            "vocab_size": 256,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": n_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
        }
        decoder = build_decoder(decoder_config(config))
        fill_random(decoder, 1, std=0.5)
        return decoder

    return build
