"""The tiny model that memory is planned for."""

from __future__ import annotations

from tests.tiny_llama import llama_config

TINY = llama_config(vocab_size=300, hidden_size=32, heads=(4, 2, 8), feed_forward=48)
