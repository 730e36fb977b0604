"""Key/value cache for generation: a new token costs a forward of that token alone."""

from __future__ import annotations

import torch
from torch import Tensor

from lora.decoder.config import DecoderConfig
from lora.errors import ModelError


class NoCache:
    """Stands in for the cache in a forward without one: returns what it gets."""

    n_tokens = 0

    def append(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return `keys` and `values` unchanged."""
        return keys, values


class KVCache:
    """Keys and values of up to `max_tokens` tokens in each of B sequences, for inference.

    All sequences advance together: pad prompts of different lengths on the left, with document −1.
    `positions` and `documents` are (B, max_tokens) int64, `keys` and `values` (B, heads,
    max_tokens, D) per block; `n_tokens` slots are filled. Nothing stored carries a gradient.
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch_size: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        heads = config.attention
        shape = batch_size, heads.num_key_value_heads, max_tokens, heads.head_dim
        layers = range(config.num_hidden_layers)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.positions = torch.zeros(batch_size, max_tokens, dtype=torch.int64, device=device)
        self.documents = torch.zeros(batch_size, max_tokens, dtype=torch.int64, device=device)
        self.input_ids = torch.zeros_like(self.documents)
        """Stored by models that may compute all tokens again (longrope)."""
        self.n_tokens = 0
        self.is_one_document = True
        """Whether every sequence is one document without padding: then no mask is needed."""

    @torch.no_grad()
    def select_sequences(self, indices: Tensor) -> None:
        """Keep only the sequences at `indices` (int64, ≤ B, any order): drops finished ones."""
        for tensors in (self.keys, self.values):
            for i, tensor in enumerate(tensors):
                tensors[i] = tensor.index_select(0, indices)
        self.positions = self.positions.index_select(0, indices)
        self.documents = self.documents.index_select(0, indices)
        self.input_ids = self.input_ids.index_select(0, indices)

    def continued(self, n_new: int) -> tuple[Tensor, Tensor]:
        """Return the positions and documents (B, n_new) that follow the last stored token."""
        last = self.n_tokens - 1
        steps = torch.arange(1, n_new + 1, device=self.positions.device)
        return (
            self.positions[:, last, None] + steps,  # (B, n_new)
            self.documents[:, last, None].expand(-1, n_new),  # (B, n_new)
        )

    def outgrows(self, limit_tokens: int, position_ids: Tensor | None, n_new: int) -> bool:
        """Whether `n_new` tokens more make a sequence's last document longer than the limit."""
        if not 0 < self.n_tokens <= self.positions.shape[1] - n_new:
            return False  # nothing is stored yet, or `begin` will say that the cache is too small
        last = self.positions[:, self.n_tokens - 1]  # (B,)
        new = last + n_new if position_ids is None else position_ids[:, -1]
        return bool(((last < limit_tokens) & (new >= limit_tokens)).any())

    def restart(
        self, n_new: int, position_ids: Tensor | None, document_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Empties the cache; return positions and documents of its tokens and of `n_new` more."""
        positions, documents = self.continued(n_new)
        positions = positions if position_ids is None else position_ids
        documents = documents if document_ids is None else document_ids
        n_sequences, n = len(self.positions), self.n_tokens
        self.n_tokens = 0
        return (
            torch.cat((self.positions[:, :n], positions.expand(n_sequences, -1)), 1),  # (B, S)
            torch.cat((self.documents[:, :n], documents), 1),  # (B, S)
        )

    def begin(self, position_ids: Tensor, document_ids: Tensor, *, is_one_document: bool) -> None:
        """Reserve slots for new tokens (B, T) and store their positions and documents.

        Raises ModelError if there are too few slots.
        """
        n_sequences, max_tokens = self.positions.shape
        start, n_new = self.n_tokens, document_ids.shape[1]
        if start + n_new > max_tokens or document_ids.shape[0] != n_sequences:
            raise ModelError(
                f"Cannot cache {n_new} more tokens for a batch of {document_ids.shape[0]}: the "
                f"cache has batch size {n_sequences} and max_tokens {max_tokens}, {start} of them "
                "filled. Make a larger one with model.new_cache(batch_size, max_tokens)."
            )
        self.positions[:, start : start + n_new] = position_ids
        self.documents[:, start : start + n_new] = document_ids
        self.n_tokens = start + n_new
        self.is_one_document = self.is_one_document and is_one_document

    @torch.no_grad()
    def append(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store block `index`'s new keys and values (B, heads, T, D); return all (B, heads, S, D).

        The slots are those that `begin` reserved.
        """
        end = self.n_tokens
        start = end - keys.shape[2]
        self.keys[index][:, :, start:end] = keys
        self.values[index][:, :, start:end] = values
        return (
            self.keys[index][:, :, :end].to(keys.dtype),
            self.values[index][:, :, :end].to(values.dtype),
        )
