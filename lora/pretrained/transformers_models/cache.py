"""What a model of transformers stores of the tokens so far, for generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora.errors import ModelError

PADDING = -1
"""Document id of padding."""


class TransformersCache:
    """transformers' own cache of keys and values; prompts are padded on the left."""

    def __init__(self, batch_size: int, past: Any) -> None:
        self.batch_size, self.past = batch_size, past
        self.n_tokens, self._has_padding = 0, False
        self._is_token = torch.zeros(batch_size, 0, dtype=torch.int64)  # (B, S)
        self._last = torch.full((batch_size,), -1, dtype=torch.int64)  # (B,) positions

    def select_sequences(self, indices: Tensor) -> None:
        """Keep only the sequences at `indices` (int64): those that ended are dropped."""
        self.past.reorder_cache(indices)  # of fewer sequences too, and all kinds of layers have it
        self._is_token = self._is_token.index_select(0, indices)
        self._last = self._last.index_select(0, indices)
        self.batch_size = len(indices)

    def run(
        self,
        forward: Callable[..., Tensor],
        input_ids: Tensor,
        position_ids: Tensor | None,
        document_ids: Tensor | None,
    ) -> Tensor:
        """Return the hidden states of new tokens (B, T), which are stored."""
        refuse_documents(document_ids)
        new = torch.ones_like(input_ids) if document_ids is None else (document_ids >= 0).long()
        self._is_token = torch.cat([self._is_token.to(new.device), new], 1)
        if position_ids is None:
            steps = new.cumsum(1) + self._last.to(new.device)[:, None]
            position_ids = steps.clamp(min=0)
        self._last = position_ids[:, -1]
        self.n_tokens += input_ids.shape[1]
        self._has_padding |= document_ids is not None and not bool(new.all())
        # Without padding attention needs no mask of its own, which is faster.
        mask = self._is_token if self._has_padding else None
        return forward(
            input_ids,
            position_ids,
            attention_mask=mask,
            past_key_values=self.past,
            use_cache=True,
        )


class RecomputingCache:
    """Stores the tokens alone: each new one costs a forward of all before it, sequence by sequence.

    For architectures whose own state cannot continue padded sequences.
    """

    def __init__(self) -> None:
        self.n_tokens = 0
        self._tokens: Tensor | None = None  # (B, S)
        self._documents: Tensor | None = None  # (B, S)

    def select_sequences(self, indices: Tensor) -> None:
        """Keep only the sequences at `indices` (int64): those that ended are dropped."""
        if self._tokens is not None and self._documents is not None:
            self._tokens = self._tokens.index_select(0, indices)
            self._documents = self._documents.index_select(0, indices)

    def run(
        self,
        forward: Callable[..., Tensor],
        input_ids: Tensor,
        position_ids: Tensor | None,
        document_ids: Tensor | None,
    ) -> Tensor:
        """Return the hidden states of new tokens (B, T); `forward` runs each sequence alone."""
        tokens, documents = self._store(input_ids, document_ids)
        hidden = each_alone(lambda part: forward(part, None), tokens, documents)
        return hidden[:, -input_ids.shape[1] :]

    def _store(self, input_ids: Tensor, document_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return all tokens and documents so far, each (B, S)."""
        refuse_documents(document_ids)
        documents = torch.zeros_like(input_ids) if document_ids is None else document_ids
        if self._tokens is not None and self._documents is not None:
            input_ids = torch.cat([self._tokens, input_ids], 1)
            documents = torch.cat([self._documents, documents], 1)
        self._tokens, self._documents, self.n_tokens = input_ids, documents, input_ids.shape[1]
        return input_ids, documents


class RotaryCache(RecomputingCache):
    """For frequencies that the longest sequence of a batch chooses: those above a limit differ.

    Keys and values are stored while all sequences are on one side of the limit. They are computed
    again when the last has crossed it; in between each sequence runs alone.
    """

    def __init__(self, new_cache: Callable[[int], TransformersCache], limit_tokens: int) -> None:
        super().__init__()
        self._new_cache, self._limit_tokens = new_cache, limit_tokens
        self._cache: TransformersCache | None = None
        self._is_long = False  # the sequences in `_cache`

    def select_sequences(self, indices: Tensor) -> None:
        """Keep only the sequences at `indices` (int64): those that ended are dropped."""
        super().select_sequences(indices)
        if self._cache is not None:
            self._cache.select_sequences(indices)

    def run(
        self,
        forward: Callable[..., Tensor],
        input_ids: Tensor,
        position_ids: Tensor | None,
        document_ids: Tensor | None,
    ) -> Tensor:
        """Return the hidden states of new tokens (B, T), which are stored."""
        n_new = input_ids.shape[1]
        tokens, documents = self._store(input_ids, document_ids)
        sides = set(((documents >= 0).sum(1) > self._limit_tokens).tolist())
        if len(sides) > 1:
            self._cache = None
            return each_alone(lambda part: forward(part, None), tokens, documents)[:, -n_new:]
        if self._cache is not None and sides == {self._is_long}:
            return self._cache.run(forward, input_ids, None, document_ids)
        self._cache, self._is_long = self._new_cache(len(tokens)), True in sides
        return self._cache.run(forward, tokens, None, documents)[:, -n_new:]


def refuse_documents(document_ids: Tensor | None) -> None:
    """Raise ModelError for several documents in a sequence, which a cache cannot keep apart."""
    if document_ids is not None and bool((document_ids > 0).any()):
        raise ModelError(
            "Cannot cache several documents of a sequence in one of transformers' models. Give "
            "each a sequence of its own."
        )


def each_alone(
    forward: Callable[[Tensor], Tensor], input_ids: Tensor, document_ids: Tensor
) -> Tensor:
    """Return the hidden states (B, T, C) of documents that `forward` gets one by one; 0 on padding.

    Slow, and right for any architecture: nothing of another document is there.
    """
    rows = []
    for tokens, documents in zip(input_ids, document_ids, strict=True):
        parts = []
        lengths = torch.unique_consecutive(documents, return_counts=True)
        for number, part in zip(
            lengths[0].tolist(), tokens.split(lengths[1].tolist()), strict=True
        ):
            hidden = forward(part[None])[0]  # (n, C)
            parts.append(torch.zeros_like(hidden) if number == PADDING else hidden)
        rows.append(torch.cat(parts))
    return torch.stack(rows)
