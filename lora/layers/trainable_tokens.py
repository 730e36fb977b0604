"""Embeddings and output heads of which a few rows train (PEFT's `trainable_token_indices`).

What differs from training the whole table: the frozen weight keeps its name and its bytes, and the
trained rows are a parameter of their own, (N, C), that replaces them in the forward pass. So
neither a gradient nor an AdamW moment has the table's size (V, C).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TrainableTokensEmbedding(nn.Embedding):
    """An embedding with frozen `weight` (V, C) whose rows `ids` are `token_rows` (N, C)."""

    def __init__(
        self, base: nn.Embedding, ids: Sequence[int], token_rows: nn.Parameter, base_rows: int
    ) -> None:
        with torch.device("meta"):  # no storage: the weight is replaced at once
            super().__init__(base.num_embeddings, base.embedding_dim, base.padding_idx)
        self.weight = base.weight.requires_grad_(False)
        self.token_rows, self.ids, self.base_rows = token_rows, tuple(ids), base_rows
        row_of_id = torch.full((base.num_embeddings,), -1, device=base.weight.device)
        row_of_id[torch.tensor(self.ids, device=row_of_id.device)] = torch.arange(
            len(self.ids), device=row_of_id.device
        )
        self.row_of_id: Tensor
        """(V,): the row of `token_rows` that a token id has; -1 where the id is frozen."""
        self.register_buffer("row_of_id", row_of_id, persistent=False)
        self.train(base.training)

    def forward(self, input: Tensor) -> Tensor:  # (B, T) -> (B, T, C)
        frozen = F.embedding(input, self.weight, self.padding_idx)  # (B, T, C)
        row = F.embedding(input, self.row_of_id[:, None]).squeeze(-1)  # (B, T), -1: frozen
        # Every token looks up some trained row and `where` picks: a mask of varying size would
        # make the host wait for the device.
        trained = F.embedding(row.clamp(min=0), self.token_rows).to(frozen.dtype)  # (B, T, C)
        return torch.where(row[..., None] >= 0, trained, frozen)

    def merge(self) -> nn.Module:
        """Return a plain embedding with the trained rows written into a new weight."""
        return plain_embedding(_merged_weight(self), self)

    def unwrap(self) -> nn.Module:
        """Return the plain embedding with the frozen weight."""
        return plain_embedding(self.weight, self)


class TrainableTokensLinear(nn.Linear):
    """A head without bias, frozen `weight` (V, C), whose rows `ids` are `token_rows` (N, C)."""

    def __init__(
        self, base: nn.Linear, ids: Sequence[int], token_rows: nn.Parameter, base_rows: int
    ) -> None:
        with torch.device("meta"):  # no storage: the weight is replaced at once
            super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight.requires_grad_(False)
        self.token_rows, self.ids, self.base_rows = token_rows, tuple(ids), base_rows
        columns = torch.tensor(self.ids, device=base.weight.device)
        self.columns: Tensor
        """(N,): the columns of the logits that come from `token_rows`."""
        self.register_buffer("columns", columns, persistent=False)
        self.train(base.training)

    def forward(self, input: Tensor) -> Tensor:  # (..., C) -> (..., V)
        frozen = F.linear(input, self.weight)  # (..., V)
        trained = F.linear(input.to(self.token_rows.dtype), self.token_rows)  # (..., N)
        return frozen.index_copy(-1, self.columns, trained.to(frozen.dtype))

    def merge(self) -> nn.Module:
        """Return a plain linear with the trained rows written into a new weight."""
        return plain_linear(_merged_weight(self), self)

    def unwrap(self) -> nn.Module:
        """Return the plain linear with the frozen weight."""
        return plain_linear(self.weight, self)


TrainableTokensLayer = TrainableTokensEmbedding | TrainableTokensLinear


def plain_embedding(weight: Tensor, like: nn.Embedding) -> nn.Embedding:
    """Return an nn.Embedding with `weight` itself (V, C), otherwise as `like`."""
    with torch.device("meta"):  # no storage: the weight is replaced at once
        plain = nn.Embedding(len(weight), like.embedding_dim, like.padding_idx)
    plain.weight = _as_parameter(weight)
    return plain.train(like.training)


def plain_linear(weight: Tensor, like: nn.Linear) -> nn.Linear:
    """Return an nn.Linear without bias with `weight` itself (V, C), otherwise as `like`."""
    with torch.device("meta"):  # no storage: the weight is replaced at once
        plain = nn.Linear(like.in_features, len(weight), bias=False)
    plain.weight = _as_parameter(weight)
    return plain.train(like.training)


def _as_parameter(weight: Tensor) -> nn.Parameter:
    return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)


@torch.no_grad()
def _merged_weight(layer: TrainableTokensLayer) -> Tensor:
    ids = torch.tensor(layer.ids, device=layer.weight.device)
    return layer.weight.index_copy(0, ids, layer.token_rows.to(layer.weight.dtype))  # (V, C)
