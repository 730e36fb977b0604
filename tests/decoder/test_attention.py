"""Attention masks: the rule, its fast paths, and the masks themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.decoder.attention import (
    NO_CACHE,
    TokenPositions,
    build_mask,
    positions_within,
    repeat_heads,
    resolve_positions,
)
from lora.decoder.cache import KVCache
from lora.decoder.families import decoder_config

CONFIG = decoder_config(
    {
        "model_type": "llama",
        "vocab_size": 10,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
)
IDS = torch.zeros(2, 6, dtype=torch.int64)
PACKED = torch.tensor([[0, 0, 0, 1, 1, -1], [-1, -1, 0, 0, 0, 0]])


def by_the_rule(positions: Tensor, documents: Tensor, window: int | None) -> Tensor:
    """Return the mask from the rule, one pair after the other."""
    rows, n_tokens = documents.shape
    mask = torch.zeros(rows, 1, n_tokens, n_tokens, dtype=torch.bool)
    for b in range(rows):
        for q in range(n_tokens):
            for k in range(n_tokens):
                distance = int(positions[b, q] - positions[b, k])
                is_same = bool(documents[b, q] == documents[b, k])
                mask[b, 0, q, k] = is_same and 0 <= distance < (window or 99)
    return mask


def empty_cache() -> KVCache:
    return KVCache(CONFIG, 2, 10, torch.float32, torch.device("cpu"))


def test_positions_begin_anew_with_each_document() -> None:
    positions = positions_within(PACKED, torch.arange(6))
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]]


def test_one_document_needs_no_mask() -> None:
    for documents in (None, torch.zeros_like(IDS), torch.tensor([[3] * 6, [-1] * 6])):
        positions = resolve_positions(IDS, None, documents, None)
        assert positions.document_ids is None
        assert positions.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]]
        mask = build_mask(positions, None)
        assert (mask.mask, mask.is_causal) == (None, True)
        mask = build_mask(positions, 6)
        assert (mask.mask, mask.is_causal) == (None, True)


def test_a_window_narrower_than_the_sequence_is_a_mask() -> None:
    mask = build_mask(resolve_positions(IDS, None, None, None), 2)
    assert mask.mask is not None
    assert mask.mask.shape == (1, 1, 6, 6)
    assert not mask.is_causal
    expected = by_the_rule(torch.arange(6)[None], torch.zeros(1, 6), 2)
    assert torch.equal(mask.mask, expected)


def test_packed_and_padded_masks_follow_the_rule() -> None:
    positions = resolve_positions(IDS, None, PACKED, None)
    for window in (None, 1, 2, 3):
        mask = build_mask(positions, window)
        assert mask.mask is not None
        assert torch.equal(mask.mask, by_the_rule(positions.position_ids, PACKED, window))
        assert mask.mask.any(-1).all()  # no empty row, which would be NaN


def test_one_token_after_one_document_needs_no_mask() -> None:
    cache = empty_cache()
    resolve_positions(IDS, None, None, cache)
    positions = resolve_positions(IDS[:, :1], None, None, cache)
    assert positions.position_ids.tolist() == [[6], [6]]
    mask = build_mask(positions, None)
    assert (mask.mask, mask.is_causal) == (None, False)


def test_one_token_after_padding_sees_its_document_only() -> None:
    cache = empty_cache()
    resolve_positions(IDS, None, PACKED, cache)
    positions = resolve_positions(IDS[1:].expand(2, -1)[:, :1], None, None, cache)
    assert positions.position_ids.tolist() == [[1], [4]]
    mask = build_mask(positions, None)
    assert mask.mask is not None
    assert mask.mask[1, 0, 0].tolist() == [False, False, True, True, True, True, True]
    mask = build_mask(positions, 3)
    assert mask.mask is not None
    assert mask.mask[1, 0, 0].tolist() == [False, False, False, False, True, True, True]


def test_documents_given_for_a_filled_cache_are_compared_with_what_it_holds() -> None:
    cache = empty_cache()
    resolve_positions(IDS, None, None, cache)
    positions = resolve_positions(IDS[:, :1], None, torch.zeros(2, 1, dtype=torch.int64), cache)
    assert positions.document_ids is None
    positions = resolve_positions(IDS[:, :1], None, torch.ones(2, 1, dtype=torch.int64), cache)
    mask = build_mask(positions, None)
    assert mask.mask is not None
    assert mask.mask[0, 0, 0].tolist() == [False] * 7 + [True]


def test_several_tokens_into_a_filled_cache_stay_causal() -> None:
    cache = empty_cache()
    resolve_positions(IDS[:, :2], None, None, cache)
    mask = build_mask(resolve_positions(IDS[:, :3], None, None, cache), None)
    assert mask.mask is not None
    assert mask.mask[0, 0].tolist() == [
        [True, True, True, False, False],
        [True, True, True, True, False],
        [True, True, True, True, True],
    ]


def test_without_a_cache_nothing_is_kept() -> None:
    positions = resolve_positions(IDS, None, None, None)
    assert isinstance(positions, TokenPositions)
    assert positions.cache is NO_CACHE
    keys, values = torch.ones(1), torch.zeros(1)
    assert NO_CACHE.append(0, keys, values) == (keys, values)


def test_repeated_heads_are_what_shared_heads_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 5, 4, generator=generator)
    k, v = torch.randn(2, 2, 2, 5, 4, generator=generator).unbind(0)
    shared = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    repeated = F.scaled_dot_product_attention(q, repeat_heads(k, 6), repeat_heads(v, 6))
    assert torch.allclose(shared, repeated, atol=1e-6)
