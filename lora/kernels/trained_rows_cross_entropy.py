"""Output head and cross-entropy as one autograd function, for a head with some trained rows.

What differs from `lora.kernels.cross_entropy`: the weight is frozen but for the rows of some tokens
(`trainable_token_indices`), which are a small matrix of their own. In each chunk their logits
replace the frozen ones, so the full weight is never copied. `plain_trained_rows_cross_entropy` is
the twin with the full weight and full logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.kernels.cross_entropy import (
    AS_THEY_ARE,
    CHUNK_TOKENS,
    IGNORE,
    LogitTransform,
    plain_linear_cross_entropy,
)


def plain_trained_rows_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    ids: Tensor,
    labels: Tensor,
    *,
    transform: LogitTransform = AS_THEY_ARE,
) -> tuple[Tensor, Tensor]:
    """The plain twin: from the whole weight and all logits at once."""
    whole = weight.index_copy(0, ids, rows.to(weight))
    return plain_linear_cross_entropy(hidden, whole, labels, transform=transform)


def trained_rows_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    ids: Tensor,
    labels: Tensor,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    transform: LogitTransform = AS_THEY_ARE,
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of hidden · headᵀ, and how many tokens have a target.

    Args:
        hidden: (N, C), any floating dtype; converted to the weight's.
        weight: (V, C), frozen.
        rows: (R, C), the head's rows at `ids`, fp32 or wider.
        ids: (R,) int64, each once, 0 … V − 1.
        labels: (N,) int64, each 0 … V − 1, or −100 for a token without a target.
        chunk_tokens: at most chunk_tokens × V logits exist at once.
        transform: a factor and a cap of the logits.

    Returns the loss in nats () in fp32 or wider and the count () int64.
    """
    is_learned = labels != IGNORE
    indices = is_learned.nonzero().squeeze(1)  # (n,); the host waits for the device: n is a shape
    learned, labels = hidden.index_select(0, indices), labels.index_select(0, indices)
    # Autocast would round the rows and their gradients; their matmuls are small, so they stay wide.
    with torch.autocast(hidden.device.type, enabled=False):
        loss_sum = _TrainedRowsCrossEntropy.apply(
            learned.to(weight.dtype), weight, rows, ids, labels, chunk_tokens, transform
        )
    return loss_sum, is_learned.sum()


class _TrainedRowsCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        rows: Tensor,
        ids: Tensor,
        labels: Tensor,
        chunk_tokens: int,
        transform: LogitTransform,
    ) -> Tensor:
        loss_sum = rows.new_zeros(())
        needs_grad = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_rows = torch.zeros_like(rows) if needs_grad else None
        for start in range(0, len(labels), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            into = None if grad_hidden is None else grad_hidden[part]
            chunk = hidden[part], weight, rows, ids, labels[part]
            loss_sum += _learn_chunk(*chunk, transform, into, grad_rows)
        ctx.save_for_backward(grad_hidden, grad_rows)
        return loss_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_rows = ctx.saved_tensors
        scale = grads[0]
        hidden = grad_hidden * scale.to(grad_hidden.dtype)
        return hidden, None, grad_rows * scale, None, None, None, None


def _learn_chunk(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    ids: Tensor,
    labels: Tensor,
    transform: LogitTransform,
    grad_hidden: Tensor | None,
    grad_rows: Tensor | None,
) -> Tensor:
    """Return the chunk's loss; fill `grad_hidden` (n, C) and add to `grad_rows` (R, C).

    d loss / d logits = powers / total − one-hot(label), for frozen and trained columns separately.
    """
    wide = hidden.to(rows.dtype)
    logits = F.linear(hidden, weight).to(rows.dtype)  # (n, V)
    logits.index_copy_(1, ids, F.linear(wide, rows))
    slopes = transform.apply(logits)
    logits -= logits.amax(1, keepdim=True)
    of_label = logits.gather(1, labels[:, None])  # (n, 1)
    powers = logits.exp_()  # (n, V), in the same memory
    total = powers.sum(1, keepdim=True)  # (n, 1)
    if grad_hidden is not None and grad_rows is not None:
        is_trained = labels[:, None] == ids  # (n, R)
        of_rows = powers.index_select(1, ids) / total - is_trained.to(rows.dtype)  # (n, R)
        if slopes is not None:
            powers *= slopes
            of_rows *= slopes.index_select(1, ids)
        if transform.scale != 1:
            of_rows *= transform.scale
        grad_rows += of_rows.T @ wide  # (R, C)
        powers.index_fill_(1, ids, 0.0)  # the frozen weight's own rows take no part
        grad = (powers.to(weight.dtype) @ weight).to(rows.dtype).div_(total)  # (n, C)
        of_frozen = (~is_trained.any(1, keepdim=True)).to(weight.dtype)  # (n, 1)
        if slopes is not None:
            of_frozen = of_frozen * slopes.gather(1, labels[:, None]).to(weight.dtype)
        grad -= weight.index_select(0, labels) * of_frozen  # the one-hot's part, of frozen labels
        if transform.scale != 1:
            grad *= transform.scale
        grad_hidden.copy_(grad.addmm_(of_rows, rows))
    return (total.log() - of_label).sum()
