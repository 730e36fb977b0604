"""A token embedding in nf4; the head is an `Nf4Linear`, with the same codes where it is tied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from lora.decoder.quantised.base import values_of
from lora.decoder.quantised.nf4 import Nf4Linear, Nf4Weight


class Nf4Embedding(Nf4Weight):
    """A frozen embedding (V, C) in nf4, without values until `load`: a lookup unpacks its rows.

    Args:
        embedding: the one that it replaces; C is even.
        block: values that share a scale.
        double_quant: whether the scales are 8-bit codes too.
    """

    out_dtype: torch.dtype
    """Of what it returns: that of the values, unless the model was cast."""

    def __init__(
        self, embedding: nn.Embedding, block: int = 64, *, double_quant: bool = True
    ) -> None:
        super().__init__()
        linear = linear_of(embedding)
        packed = Nf4Linear(linear, block, double_quant=double_quant)
        self.take_sizes(linear)
        self.weight = packed.weight
        self.share_packed(packed)
        self.out_dtype = self.value_dtype

    @property
    def result_dtype(self) -> torch.dtype:
        return self.out_dtype

    @property
    def num_embeddings(self) -> int:
        """V."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        """C."""
        return self.in_features

    def load(self, weight: Tensor, name: str) -> None:
        super().load(weight, name)
        self.out_dtype = weight.dtype

    def forward(self, input: Tensor) -> Tensor:  # (B, T) -> (B, T, C)
        values = torch.empty(
            input.numel(), self.in_features, dtype=self.value_dtype, device=self.weight.device
        )
        self.unpack_rows_into(input.flatten(), values)
        return values.view(*input.shape, self.in_features).to(self.out_dtype)

    def plain_layer(self, weight: Tensor) -> nn.Module:
        with torch.device("meta"):  # no storage: the weight is replaced at once
            plain = nn.Embedding(self.out_features, self.in_features)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        return plain.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # As a plain embedding's: `model.to(dtype)` says in which dtype the model computes.
        probe = fn(torch.empty(0, dtype=self.out_dtype))
        self.out_dtype = probe.dtype
        return self

    def extra_repr(self) -> str:
        sizes = f"{self.out_features}, {self.in_features}"
        return f"{sizes}, nf4, block={self.block}, double_quant={self.double_quant}"


def linear_of(embedding: nn.Embedding) -> nn.Linear:
    """Return a linear with the weight (V, C) of `embedding`."""
    with torch.device("meta"):  # no storage: the weight is replaced at once
        linear = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False)
    linear.weight = embedding.weight
    return linear.train(embedding.training)


class Nf4Rows:
    """The rows of an nf4 table, unpacked when they are asked for: the loss takes slices of a head.

    Args:
        table: whose values they are.
        dtype: of the values.
    """

    def __init__(self, table: Nf4Weight, dtype: torch.dtype) -> None:
        self.table, self.dtype = table, dtype

    def __len__(self) -> int:
        return self.table.out_features

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the rows from `start` to `stop`."""
        values = self._empty(stop - start)
        self.table.unpack_into(values, start)
        return values

    def select(self, ids: Tensor) -> Tensor:
        """Return the rows `ids` (n,), as (n, C)."""
        values = self._empty(len(ids))
        self.table.unpack_rows_into(ids, values)
        return values

    def _empty(self, n_rows: int) -> Tensor:
        shape, device = (n_rows, self.table.in_features), self.table.weight.device
        return torch.empty(shape, dtype=self.dtype, device=device)


def rows_of(head: nn.Module, hidden: Tensor) -> Tensor | Nf4Rows:
    """Return the weight (V, C) of a head.

    Of one in nf4 what unpacks its rows, in the dtype of the `hidden` states that it multiplies.
    """
    return Nf4Rows(head, hidden.dtype) if isinstance(head, Nf4Weight) else values_of(head)
