"""The loss of a linear head inside a captured step: chunk by chunk, in fixed shapes.

What differs from `lora.kernels.cross_entropy`: no token is left out, because which ones are learned
would have to be read on the host; and each chunk's logits become their gradient in place, by the
kernel of the hand-written step. A head in nf4 is unpacked by slices of the vocabulary, twice for
each chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora.decoder.quantised.nf4 import Nf4Weight
from lora.kernels.cross_entropy import AS_THEY_ARE, LogitTransform
from lora.layers.trainable_tokens import TrainableTokensLinear

CHUNK_LOGITS = 2**27
"""Logits that exist at once: 268 MB in bf16."""
ROUND_TOKENS = 128
"""A chunk's tokens are a multiple of it, as matmuls like them."""
UNPACKED_VALUES = 2**24
"""Of a packed head that are unpacked at once: 34 MB in bf16."""
ROUND_ROWS = 64
"""Rows of a slice are a multiple of it, so that the columns of its logits are aligned."""


@dataclass(frozen=True)
class ChunkedLoss:
    """Called with hidden states (B, T, C) and labels (B, T): the summed cross-entropy ()."""

    head: nn.Linear | Nf4Weight
    """Frozen, its bias too; or a TrainableTokensLinear, some of whose rows train."""
    token_loss: Callable[..., None]
    """Of `lora.kernels.step.ops.Ops`."""
    transform: LogitTransform = AS_THEY_ARE

    def __call__(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the loss in nats, in fp32 or wider."""
        rows = self.head.token_rows if isinstance(self.head, TrainableTokensLinear) else None
        loss: Tensor = _HeadLoss.apply(hidden.flatten(0, -2), rows, labels.flatten(), self)
        return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, rows: Tensor | None, labels: Tensor, how: ChunkedLoss
    ) -> Tensor:
        device = hidden.device.type
        is_cast = torch.is_autocast_enabled(device)
        own = hidden.dtype if isinstance(how.head, Nf4Weight) else how.head.weight.dtype
        kind = torch.get_autocast_dtype(device) if is_cast else own
        with torch.autocast(device, enabled=False):
            losses, *grads = _learn(hidden, labels, how, kind)
        ctx.save_for_backward(*grads)
        return losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, rows = (
            None if grad is None else grad * grads[0].to(grad.dtype) for grad in ctx.saved_tensors
        )
        return hidden, rows, None, None


def _learn(
    hidden: Tensor, labels: Tensor, how: ChunkedLoss, kind: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return each token's loss (N,) and the gradients of `hidden` (N, C) and of trained rows."""
    head = _PackedHead(how.head, kind) if isinstance(how.head, Nf4Weight) else _Head(how.head, kind)
    bias = None if how.head.bias is None else how.head.bias.to(kind)
    rows = _Rows(how.head) if isinstance(how.head, TrainableTokensLinear) else None
    n_columns = how.head.out_features
    tokens = max(1, CHUNK_LOGITS // n_columns // ROUND_TOKENS) * ROUND_TOKENS
    logits = hidden.new_empty(min(tokens, len(labels)), n_columns, dtype=kind)  # (chunk, V)
    losses = hidden.new_empty(len(labels), dtype=torch.promote_types(kind, torch.float32))
    grad = torch.empty_like(hidden)
    scale, softcap = how.transform.scale, how.transform.softcap
    for start in range(0, len(labels), tokens):
        part = slice(start, start + tokens)
        states = hidden[part].to(kind)
        own = logits[: len(states)]
        head.write_logits(states, own)
        if bias is not None:
            own += bias
        if rows is not None:
            rows.write_logits(states, own)
        how.token_loss(own, labels[part], losses[part], scale=scale, softcap=softcap)
        # The logits are their gradient now.
        of_rows = None if rows is None else rows.take_gradient(states, own)
        head.write_gradient(own, grad[part])
        if of_rows is not None:
            grad[part] += of_rows.to(grad.dtype)
    return losses, grad, None if rows is None else rows.grad


class _Head:
    """The matmuls with a head's weight (V, C)."""

    def __init__(self, head: nn.Linear, kind: torch.dtype) -> None:
        self.weight = head.weight.to(kind)

    def write_logits(self, states: Tensor, logits: Tensor) -> None:
        """Fill `logits` (n, V), of tokens `states` (n, C)."""
        torch.mm(states, self.weight.T, out=logits)

    def write_gradient(self, d_logits: Tensor, into: Tensor) -> None:
        """Fill `into` (n, C), the gradient of the states, from that of the logits."""
        if into.dtype == d_logits.dtype:
            torch.mm(d_logits, self.weight, out=into)
        else:
            into.copy_(d_logits @ self.weight)


class _PackedHead:
    """The same with a weight in nf4, of which a slice of rows is unpacked at a time."""

    def __init__(self, head: Nf4Weight, kind: torch.dtype) -> None:
        rows = max(1, UNPACKED_VALUES // head.in_features // ROUND_ROWS) * ROUND_ROWS
        shape = min(rows, head.out_features), head.in_features
        self.head, self.room = head, torch.empty(shape, dtype=kind, device=head.weight.device)

    def write_logits(self, states: Tensor, logits: Tensor) -> None:
        """Fill `logits` (n, V), of tokens `states` (n, C)."""
        for rows, weight in self._slices():
            torch.mm(states, weight.T, out=logits[:, rows])

    def write_gradient(self, d_logits: Tensor, into: Tensor) -> None:
        """Fill `into` (n, C); summed over slices in fp32 or wider."""
        wide = torch.promote_types(into.dtype, torch.float32)
        total = torch.zeros_like(into, dtype=wide)
        for rows, weight in self._slices():
            total += d_logits[:, rows] @ weight
        into.copy_(total)

    def _slices(self) -> Iterator[tuple[slice, Tensor]]:
        n_rows = self.head.out_features
        for start in range(0, n_rows, len(self.room)):
            rows = slice(start, min(start + len(self.room), n_rows))
            weight = self.room[: rows.stop - start]
            self.head.unpack_into(weight, start)
            yield rows, weight


class _Rows:
    """The trained rows of a head: their logits take the place of the frozen ones."""

    def __init__(self, head: TrainableTokensLinear) -> None:
        self.values, self.columns = head.token_rows.detach(), head.columns  # (R, C), (R,)
        self.grad = torch.zeros_like(self.values)

    def write_logits(self, states: Tensor, logits: Tensor) -> None:
        """Changes `logits` (n, V) in place, of tokens `states` (n, C)."""
        own = states.to(self.values.dtype) @ self.values.T  # (n, R)
        logits.index_copy_(1, self.columns, own.to(logits.dtype))

    def take_gradient(self, states: Tensor, gradient: Tensor) -> Tensor:
        """Changes `gradient` (n, V) of the logits in place: that of the frozen ones is left.

        Adds to the rows' own; returns what they add to that of `states` (n, C).
        """
        own = gradient.index_select(1, self.columns).to(self.values.dtype)  # (n, R)
        gradient.index_fill_(1, self.columns, 0.0)
        self.grad += own.T @ states.to(self.values.dtype)
        return own @ self.values
