"""Keys and values of the tokens already seen, so that a new token costs one forward of itself."""

from __future__ import annotations

import torch
from torch import Tensor

from lora.decoder.config import DecoderConfig
from lora.errors import ModelError


class NoCache:
    """What a forward without a cache uses: gives back what it gets."""

    n_tokens = 0

    def append(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return `keys` and `values` as they are."""
        return keys, values


class KVCache:
    """Room for the keys and values of `max_tokens` tokens in each of B rows, for inference.

    All rows advance together: pad prompts of different length on the left, with document −1.
    `positions` and `documents` are (B, max_tokens) int64; `n_tokens` slots are filled. Nothing
    stored carries a gradient.
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
        self.n_tokens = 0
        self.is_one_document = True
        """Whether every row holds one document and no padding: then no mask is needed."""

    @property
    def max_tokens(self) -> int:
        """Slots in each row."""
        return self.positions.shape[1]

    def reset(self) -> None:
        """Forget everything; the memory is kept."""
        self.n_tokens, self.is_one_document = 0, True

    @torch.no_grad()
    def select_sequences(self, rows: Tensor) -> None:
        """Keep only `rows` (int64, ≤ B of them, any order): drops sequences that have ended."""
        for tensors in (self.keys, self.values):
            for i, tensor in enumerate(tensors):
                tensors[i] = tensor.index_select(0, rows)
        self.positions = self.positions.index_select(0, rows)
        self.documents = self.documents.index_select(0, rows)

    def continued(self, n_new: int) -> tuple[Tensor, Tensor]:
        """Return the positions and documents (B, n_new) that follow the last stored token."""
        last = self.n_tokens - 1
        steps = torch.arange(1, n_new + 1, device=self.positions.device)
        return (
            self.positions[:, last, None] + steps,  # (B, n_new)
            self.documents[:, last, None].expand(-1, n_new),  # (B, n_new)
        )

    def begin(self, position_ids: Tensor, document_ids: Tensor, *, is_one_document: bool) -> None:
        """Take room for new tokens (B, T) and note where they stand.

        Raises ModelError if there is no room for them.
        """
        rows, room = self.positions.shape
        start, n_new = self.n_tokens, document_ids.shape[1]
        if start + n_new > room or document_ids.shape[0] != rows:
            raise ModelError(
                f"The cache was asked to take {n_new} more tokens for {document_ids.shape[0]} "
                f"rows: it has {rows} rows of {room} tokens, {start} of them filled. Make a "
                "larger one with model.new_cache(batch_size, max_tokens)."
            )
        self.positions[:, start : start + n_new] = position_ids
        self.documents[:, start : start + n_new] = document_ids
        self.n_tokens = start + n_new
        self.is_one_document = self.is_one_document and is_one_document

    @torch.no_grad()
    def append(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store block `index`'s new keys and values (B, heads, T, D); return all (B, heads, S, D).

        The slots are those that `begin` took.
        """
        end = self.n_tokens
        start = end - keys.shape[2]
        self.keys[index][:, :, start:end] = keys
        self.values[index][:, :, start:end] = values
        return (
            self.keys[index][:, :, :end].to(keys.dtype),
            self.values[index][:, :, :end].to(values.dtype),
        )
