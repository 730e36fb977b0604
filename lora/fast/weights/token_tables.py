"""Embedding and output head of the hand-written step: frozen, in a slot, or with rows in a slot.

LoRA on the head is in matmuls of its own, which are narrow.

What differs from the textbook: trained rows (`lora.layers.trainable_tokens`) are not written into
the frozen table. The embeddings and logits of their tokens take the place of the table's, so the
table keeps its bytes and no second one is held beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora.fast.weights.adapted import RANK_STEP
from lora.fast.weights.flat import FlatParameters, accumulate
from lora.fast.weights.norms_and_embeddings import WeightGroup
from lora.fast.weights.stacked_flat import StackedFlat
from lora.layers.trainable_tokens import (
    TrainableTokensEmbedding,
    TrainableTokensLayer,
    TrainableTokensLinear,
)
from lora.lora_module import LoRALayer

MAX_ONE_HOT_ELEMENTS = 2**24
"""Of the matrix that tells which token has which trained row: longer batches go in parts."""


class TrainedRows(WeightGroup):
    """The trained rows (R, C) of one table, or of both tables where these share them."""

    def __init__(
        self,
        layer: TrainableTokensLayer,
        flat: FlatParameters | StackedFlat,
        dtype: torch.dtype,
        lr_fraction: float,
    ) -> None:
        super().__init__([layer], flat, dtype, lr_fraction=lr_fraction, name="token_rows")
        self.parameter = layer.token_rows
        self.ids = torch.tensor(layer.ids, device=flat.device)
        """(R,): the tokens."""

    def accumulate(self, gradient: Tensor, *, first: bool) -> None:
        """Add `gradient` (R, C) to that of the rows."""
        assert self.slot is not None
        accumulate(self.slot.gradients[0], gradient, first=first)

    def accumulate_embedded(
        self, ids: Tensor, dy: Tensor, *, first: bool, factor: float = 1.0
    ) -> None:
        """Add the gradient `dy` (N, C) of the embeddings of the tokens `ids` (N,), · `factor`."""
        part = max(1, MAX_ONE_HOT_ELEMENTS // len(self.ids))
        for start in range(0, len(ids), part):
            tokens = slice(start, start + part)
            # A matmul, not a sum by index: that would depend on which thread comes first.
            is_row = (ids[tokens] == self.ids[:, None]).to(dy.dtype)  # (R, tokens)
            gradient = is_row @ dy[tokens]  # (R, C)
            gradient = gradient if factor == 1 else gradient * factor
            self.accumulate(gradient, first=first and start == 0)


class HeadLoRA:
    """LoRA's A (R, C) and B (V, R) of the output head, in slots; R is the rank, rounded up."""

    def __init__(self, layer: LoRALayer, flat: FlatParameters, dtype: torch.dtype) -> None:
        self.layer, self.dtype = layer, dtype
        width = -(-layer.rank // RANK_STEP) * RANK_STEP  # rows of the copies stay aligned
        outputs, inputs = layer.out_features, layer.in_features
        self.a_slot = flat.reserve((width, inputs), decays=True)
        self.b_slot = flat.reserve((outputs, width), decays=True)

    def fill(self) -> None:
        """Put the values into the slots and make the parameters views of them."""
        rank = self.layer.rank  # beyond it A and B are zero, and so are their gradients
        for parameter, view in (
            (self.layer.lora_A, self.a_slot.values[:rank]),
            (self.layer.lora_B, self.b_slot.values[:, :rank]),
        ):
            view.copy_(parameter)
            parameter.data = view
        self.a = self.a_slot.values.to(self.dtype, copy=True)  # (R, C)
        self.b = (self.b_slot.values * self.layer.scaling).to(self.dtype)  # s · B, (V, R)

    def refresh(self) -> None:
        """Bring the copies in the compute dtype up to date with the slots."""
        self.a.copy_(self.a_slot.values)
        torch.mul(self.b_slot.values, self.layer.scaling, out=self.b)

    def add_logits(self, hidden: Tensor, logits: Tensor) -> None:
        """Changes `logits` (n, V) in place: LoRA's, of `hidden` (n, C), are added."""
        logits.addmm_(hidden @ self.a.T, self.b.T)

    def backward(self, d_logits: Tensor, hidden: Tensor, d_hidden: Tensor, *, first: bool) -> None:
        """Changes `d_hidden` (n, C) in place, and the gradients of A and B."""
        low, d_low = hidden @ self.a.T, d_logits @ self.b  # (n, R) each
        d_hidden.addmm_(d_low, self.a)
        accumulate(self.a_slot.gradients, d_low.T @ hidden, first=first)
        gradient = (d_logits.T @ low) * self.layer.scaling  # (V, R)
        accumulate(self.b_slot.gradients, gradient, first=first)


class TokenTable(WeightGroup):
    """The embedding or the output head, (V, C).

    Args:
        module: whose weight it is.
        flat: where what trains gets its slot.
        dtype: compute dtype.
        decays: whether weight decay applies.
        lr_fraction: of the learning rate.
        other: the table made before, whose trained rows may be the same.
    """

    rows: TrainedRows | None = None
    """Rows that take the place of the table's."""
    lora: HeadLoRA | None = None
    """What is added to the logits."""

    def __init__(
        self,
        module: nn.Module,
        flat: FlatParameters | StackedFlat,
        dtype: torch.dtype,
        *,
        decays: bool = False,
        lr_fraction: float = 1.0,
        other: TokenTable | None = None,
    ) -> None:
        super().__init__([module], flat, dtype, decays=decays, lr_fraction=lr_fraction)
        self.find_trained(module, flat, lr_fraction, other)

    def find_trained(
        self,
        module: nn.Module,
        flat: FlatParameters | StackedFlat,
        lr_fraction: float,
        other: TokenTable | None,
    ) -> None:
        """Find what trains of `module` beside its weight: single rows, or LoRA."""
        if isinstance(module, LoRALayer):
            assert isinstance(flat, FlatParameters), "stacked adapters leave the head alone"
            self.lora = HeadLoRA(module, flat, self.dtype)
        if isinstance(module, TrainableTokensEmbedding):
            self.row_of_id = module.row_of_id  # (V,), −1 for a token without a trained row
        if isinstance(module, TrainableTokensEmbedding | TrainableTokensLinear):
            rows = None if other is None else other.rows
            if rows is None or rows.parameter is not module.token_rows:
                rows = TrainedRows(module, flat, self.dtype, lr_fraction)
            self.rows = rows

    @property
    def trains(self) -> bool:
        """Whether all of it or some of its rows train."""
        return self.slot is not None or self.rows is not None

    def shares_gradient(self, other: TokenTable) -> bool:
        """Whether both add to one gradient: tied tables, or tables with the same rows."""
        return self is other or (self.rows is not None and self.rows is other.rows)

    def look_up(self, ids: Tensor) -> Tensor:
        """Return the table's own rows (N, C) of the tokens `ids` (N,), a copy."""
        return self.tensors[0].index_select(0, ids)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings (N, C) of the tokens `ids` (N,)."""
        embedded = self.look_up(ids)
        if self.rows is None:
            return embedded
        row = self.row_of_id.index_select(0, ids)  # (N,)
        # Every token looks up some row and `where` picks: no shape depends on the batch.
        trained = self.rows.tensors[0].index_select(0, row.clamp(min=0))  # (N, C)
        return torch.where((row >= 0)[:, None], trained, embedded)

    def accumulate_embedded(
        self, ids: Tensor, dy: Tensor, *, first: bool, factor: float = 1.0
    ) -> None:
        """Add the gradient `dy` (N, C) of the embeddings of the tokens `ids` (N,), · `factor`."""
        target = self.gradient(0)  # (V, C)
        if self.rows is not None:
            self.rows.accumulate_embedded(ids, dy, first=first, factor=factor)
        elif target is not None:
            if first:
                target.zero_()
            wide = dy.to(target.dtype)
            target.index_add_(0, ids, wide if factor == 1 else wide * factor)

    def multiply(self, hidden: Tensor, logits: Tensor) -> None:
        """Changes `logits` (n, V) in place: those of `hidden` (n, C) by the table's own rows."""
        torch.mm(hidden, self.tensors[0].T, out=logits)

    def multiply_back(self, d_logits: Tensor, d_hidden: Tensor) -> None:
        """Changes `d_hidden` (n, C) in place: what `d_logits` (n, V) come to by these rows."""
        torch.mm(d_logits, self.tensors[0], out=d_hidden)

    def project(self, hidden: Tensor, logits: Tensor) -> None:
        """Changes `logits` (n, V) in place: those of `hidden` (n, C)."""
        self.multiply(hidden, logits)
        if self.rows is not None:
            logits.index_copy_(1, self.rows.ids, hidden @ self.rows.tensors[0].T)
        if self.lora is not None:
            self.lora.add_logits(hidden, logits)

    def project_backward(
        self, d_logits: Tensor, hidden: Tensor, d_hidden: Tensor, *, first: bool
    ) -> None:
        """Changes `d_hidden` (n, C) in place, from `d_logits` (n, V), which may change too.

        What trains gets its gradient from them and `hidden` (n, C).
        """
        own = None if self.rows is None else d_logits.index_select(1, self.rows.ids)  # (n, R)
        if self.rows is not None:
            d_logits.index_fill_(1, self.rows.ids, 0.0)  # the table's own rows take no part
        self.multiply_back(d_logits, d_hidden)
        target = self.gradient(0)  # (V, C)
        if target is not None:
            accumulate(target, d_logits.T @ hidden, first=first)
        if self.rows is not None and own is not None:
            d_hidden.addmm_(own, self.rows.tensors[0])
            self.rows.accumulate(own.T @ hidden, first=first)
        if self.lora is not None:
            self.lora.backward(d_logits, hidden, d_hidden, first=first)
