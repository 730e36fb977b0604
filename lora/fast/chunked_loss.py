"""The loss of a linear head inside a captured step: chunk by chunk, in fixed shapes.

What differs from `lora.kernels.cross_entropy`: no token is left out, because which ones are learned
would have to be read on the host; and each chunk's logits become their gradient in place, by the
kernel of the hand-written step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora.kernels.cross_entropy import AS_THEY_ARE, LogitTransform
from lora.layers.trainable_tokens import TrainableTokensLinear

CHUNK_LOGITS = 2**27
"""Logits that exist at once: 268 MB in bf16."""
ROUND_TOKENS = 128
"""A chunk's tokens are a multiple of it, as matmuls like them."""


@dataclass(frozen=True)
class ChunkedLoss:
    """Called with hidden states (B, T, C) and labels (B, T): the summed cross-entropy ()."""

    head: nn.Linear
    """Frozen, its bias too; or with some rows that train, a TrainableTokensLinear."""
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
        kind = torch.get_autocast_dtype(device) if is_cast else how.head.weight.dtype
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
    weight = how.head.weight.to(kind)  # (V, C)
    bias = None if how.head.bias is None else how.head.bias.to(kind)
    rows = _Rows(how.head) if isinstance(how.head, TrainableTokensLinear) else None
    tokens = max(1, CHUNK_LOGITS // len(weight) // ROUND_TOKENS) * ROUND_TOKENS
    logits = hidden.new_empty(min(tokens, len(labels)), len(weight), dtype=kind)  # (chunk, V)
    losses = hidden.new_empty(len(labels), dtype=torch.promote_types(kind, torch.float32))
    grad = torch.empty_like(hidden)
    scale, softcap = how.transform.scale, how.transform.softcap
    for start in range(0, len(labels), tokens):
        part = slice(start, start + tokens)
        states = hidden[part].to(kind)
        own = logits[: len(states)]
        torch.mm(states, weight.T, out=own)
        if bias is not None:
            own += bias
        if rows is not None:
            rows.write_logits(states, own)
        how.token_loss(own, labels[part], losses[part], scale=scale, softcap=softcap)
        # The logits are their gradient now.
        of_rows = None if rows is None else rows.take_gradient(states, own)
        if grad.dtype == kind:
            torch.mm(own, weight, out=grad[part])
        else:
            grad[part] = own @ weight
        if of_rows is not None:
            grad[part] += of_rows.to(grad.dtype)
    return losses, grad, None if rows is None else rows.grad


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
