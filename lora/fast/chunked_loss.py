"""The loss of a frozen linear head inside a captured step: chunk by chunk, in fixed shapes.

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

CHUNK_LOGITS = 2**27
"""Logits that exist at once: 268 MB in bf16."""
ROUND_TOKENS = 128
"""A chunk's tokens are a multiple of it, as matmuls like them."""


@dataclass(frozen=True)
class ChunkedLoss:
    """Called with hidden states (B, T, C) and labels (B, T): the summed cross-entropy ()."""

    head: nn.Linear
    """Frozen; its bias too."""
    token_loss: Callable[..., None]
    """Of `lora.kernels.step.ops.Ops`."""
    transform: LogitTransform = AS_THEY_ARE

    def __call__(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the loss in nats, in fp32 or wider."""
        loss: Tensor = _HeadLoss.apply(hidden.flatten(0, -2), labels.flatten(), self)
        return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, how: ChunkedLoss) -> Tensor:
        device = hidden.device.type
        is_cast = torch.is_autocast_enabled(device)
        kind = torch.get_autocast_dtype(device) if is_cast else how.head.weight.dtype
        with torch.autocast(device, enabled=False):
            losses, grad = _learn(hidden, labels, how, kind)
        ctx.save_for_backward(grad)
        return losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None


def _learn(
    hidden: Tensor, labels: Tensor, how: ChunkedLoss, kind: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return each token's loss (N,) and the gradient of `hidden` (N, C)."""
    weight = how.head.weight.to(kind)  # (V, C)
    bias = None if how.head.bias is None else how.head.bias.to(kind)
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
        how.token_loss(own, labels[part], losses[part], scale=scale, softcap=softcap)
        # The logits are their gradient now.
        if grad.dtype == kind:
            torch.mm(own, weight, out=grad[part])
        else:
            grad[part] = own @ weight
    return losses, grad
