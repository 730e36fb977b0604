"""The reference models and the tokenizers that the tests of `decoder` and `data` are given."""

from __future__ import annotations

from tests.data.conftest import (
    bos_tokenizer,
    chatml_tokenizer,
    sentencepiece,
    smollm2_tokenizer,
    templates,
    tokenizer,
)
from tests.decoder.conftest import build_pair, make_ids, pair

__all__ = [
    "bos_tokenizer",
    "build_pair",
    "chatml_tokenizer",
    "make_ids",
    "pair",
    "sentencepiece",
    "smollm2_tokenizer",
    "templates",
    "tokenizer",
]
