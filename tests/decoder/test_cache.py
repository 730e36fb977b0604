"""The cache stores what it is given, in order, without gradients, up to its size."""

from __future__ import annotations

import pytest
import torch

from lora.decoder.cache import KVCache
from lora.decoder.families import decoder_config
from lora.errors import ModelError

CONFIG = decoder_config(
    {
        "model_type": "llama",
        "vocab_size": 10,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
)
ZEROS = torch.zeros(3, 2, dtype=torch.int64)


def make_cache() -> KVCache:
    return KVCache(CONFIG, 3, 5, torch.float32, torch.device("cpu"))


def new_keys(n_tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(3, 1, n_tokens, 4, generator=torch.Generator().manual_seed(seed))


def test_what_was_appended_comes_back_in_order() -> None:
    cache = make_cache()
    first, second = new_keys(2, 0), new_keys(1, 1)
    cache.begin(ZEROS, ZEROS, is_one_document=True)
    keys, values = cache.append(1, first, -first)
    assert torch.equal(keys, first)
    cache.begin(ZEROS[:, :1], ZEROS[:, :1], is_one_document=True)
    keys, values = cache.append(1, second, -second)
    assert torch.equal(keys, torch.cat((first, second), 2))
    assert torch.equal(values, -keys)
    assert keys.data_ptr() == cache.keys[1].data_ptr()  # a view, not a copy


def test_nothing_stored_carries_a_gradient() -> None:
    cache = make_cache()
    cache.begin(ZEROS, ZEROS, is_one_document=True)
    keys, _ = cache.append(0, new_keys(2, 0).requires_grad_(True), new_keys(2, 1))
    assert not keys.requires_grad


def test_what_follows_continues_each_sequences_last_token() -> None:
    cache = make_cache()
    positions = torch.tensor([[0, 1], [4, 5], [0, 0]])
    documents = torch.tensor([[0, 0], [2, 2], [-1, 0]])
    cache.begin(positions, documents, is_one_document=False)
    next_positions, next_documents = cache.continued(2)
    assert next_positions.tolist() == [[2, 3], [6, 7], [1, 2]]
    assert next_documents.tolist() == [[0, 0], [2, 2], [0, 0]]
    assert not cache.is_one_document


def test_selected_sequences_keep_everything() -> None:
    cache = make_cache()
    cache.begin(torch.tensor([[0, 1], [4, 5], [7, 8]]), ZEROS, is_one_document=True)
    cache.append(0, new_keys(2, 0), new_keys(2, 1))
    cache.select_sequences(torch.tensor([2]))
    assert cache.positions[:, :2].tolist() == [[7, 8]]
    assert torch.equal(cache.values[0][:, :, :2], new_keys(2, 1)[2:])
    assert cache.positions.shape == (1, 5)


def test_no_room_is_an_error_that_changes_nothing() -> None:
    cache = make_cache()
    longer = torch.zeros(3, 6, dtype=torch.int64)
    with pytest.raises(
        ModelError, match=r"cache 6 more tokens.*batch size 3 and max_tokens 5, 0 of them"
    ):
        cache.begin(longer, longer, is_one_document=True)
    assert cache.n_tokens == 0
