"""Output head and cross-entropy as one autograd function: all logits never exist at once.

What differs from the textbook: tokens without a target are taken out before the matmul; gradients
are computed in forward, chunk by chunk, while a chunk's logits are still there; and the softmax is
never normalised over (n, V): its matmul with the weight, which is (n, C), is divided instead. On a
CPU with a frozen weight the chunks are of the vocabulary (online softmax, arXiv 1805.02867): weight
and logits are read for the second time while they are in the cache. `plain_linear_cross_entropy` is
the twin with full logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.kernels.matmul import matmul_nt, round_rows

IGNORE = -100
"""Label of a token without a target."""
CHUNK_TOKENS = 512
"""Tokens whose logits exist at once."""
CHUNK_COLUMNS = 6144
"""Of the vocabulary, on a CPU: their logits of 512 tokens are 12.6 MB, which stay in the cache."""
MIN_TOKENS_PER_PADDING = 16
"""On a CPU tokens are padded to a round count if that adds at most one in so many."""


def plain_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """The plain twin: from the logits (N, V) of all tokens."""
    logits = F.linear(hidden, weight)  # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss_sum = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return loss_sum, (labels != IGNORE).sum()


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: int = CHUNK_TOKENS
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of hidden · weightᵀ, and how many tokens have a target.

    Args:
        hidden: (N, C), any floating type.
        weight: (V, C), of the same dtype; its gradient is computed only if it is required.
        labels: (N,) int64, each 0 … V − 1, or −100 for a token without a target.
        chunk_tokens: at most chunk_tokens × V logits exist at once.

    Returns the loss in nats () in fp32 (fp64 for fp64 inputs; so is the log-sum-exp) and the
    count () int64. Without a single target the loss and its gradients are zero.
    """
    is_learned = labels != IGNORE
    rows = is_learned.nonzero().squeeze(1)  # (n,); the host waits for the device: n is a shape
    learned = hidden if len(rows) == len(labels) else hidden.index_select(0, rows)  # (n, C)
    labels = labels if len(rows) == len(labels) else labels.index_select(0, rows)  # (n,)
    return learned_cross_entropy(learned, weight, labels, chunk_tokens), is_learned.sum()


def learned_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int
) -> Tensor:
    """Return the summed cross-entropy () of tokens that all have a target; see above."""
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        loss_sum: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, chunk_tokens)
        return loss_sum
    return _loss_sum(hidden, weight, labels, chunk_tokens)


def _loss_sum(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
    total = hidden.new_zeros((), dtype=_wide(hidden))
    for start in range(0, len(labels), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        total += _chunk_loss(hidden[part], weight, labels[part])[0]
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int
    ) -> Tensor:
        wide = _wide(hidden)
        loss_sum = hidden.new_zeros((), dtype=wide)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        for start in range(0, len(labels), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            into = None if grad_hidden is None else grad_hidden[part]
            if weight.is_cpu and into is not None and grad_weight is None:
                loss_sum += _learn_columns(hidden[part], weight, labels[part], into)
            else:
                loss_sum += _learn_chunk(hidden[part], weight, labels[part], into, grad_weight)
        # The gradients themselves, up to the factor that backward brings.
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grads[0].to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grads[0]).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _chunk_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss (), exp(logits − max) (n, V) and its sum over V (n, 1), all fp32 or wider."""
    logits = matmul_nt(hidden, weight).to(_wide(hidden))  # (n, V)
    logits -= logits.amax(1, keepdim=True)  # so that no power overflows
    of_label = logits.gather(1, labels[:, None])  # (n, 1)
    powers = logits.exp_()  # (n, V), in the same memory
    total = powers.sum(1, keepdim=True)  # (n, 1)
    return (total.log() - of_label).sum(), powers, total


def _learn_chunk(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
) -> Tensor:
    """Return the chunk's loss; fill `grad_hidden` (n, C) and add to `grad_weight` (V, C).

    d loss / d logits = powers / total − one-hot(label) is never formed, only its two matmuls are.
    """
    loss, powers, total = _chunk_loss(hidden, weight, labels)
    powers = powers.to(weight.dtype)
    if grad_hidden is not None:
        grad = matmul_nt(powers, weight.T).to(total.dtype).div_(total)  # (n, C)
        grad_hidden.copy_(grad.sub_(weight.index_select(0, labels)))  # the one-hot's part
    if grad_weight is not None:
        # Divided by the total on the narrow side, as above.
        wide = hidden.to(total.dtype)
        grad_weight += powers.T @ (wide / total).to(hidden.dtype)  # (V, C)
        grad_weight.index_add_(0, labels, wide, alpha=-1)
    return loss


def _learn_columns(hidden: Tensor, weight: Tensor, labels: Tensor, grad_hidden: Tensor) -> Tensor:
    """Return the loss of tokens (n, C) and fill `grad_hidden` (n, C), by chunks of the vocabulary.

    Sums are taken relative to the largest logit so far, and shrunk when a larger one comes.
    """
    n, wide = len(labels), _wide(hidden)
    own_weight = weight.index_select(0, labels)  # (n, C), of the labels
    own = (hidden.to(wide) * own_weight).sum(1, keepdim=True)  # (n, 1), their logits
    # oneDNN gets round row counts alone: a few rows of zeros cost less than the slower library.
    if 0 < round_rows(n) - n <= n // MIN_TOKENS_PER_PADDING:
        hidden = F.pad(hidden, (0, 0, 0, round_rows(n) - n))
    largest = hidden.new_full((len(hidden), 1), -torch.inf, dtype=wide)
    total = torch.zeros_like(largest)
    grad = torch.zeros_like(hidden, dtype=wide)
    for columns in weight.split(CHUNK_COLUMNS):  # (columns, C)
        logits = matmul_nt(hidden, columns).to(wide)  # (n, columns)
        larger = torch.maximum(largest, logits.amax(1, keepdim=True))  # (n, 1)
        shrink = (largest - larger).exp_()  # (n, 1), zero the first time: exp(−∞)
        powers = logits.sub_(larger).exp_()  # (n, columns)
        total.mul_(shrink).add_(powers.sum(1, keepdim=True))
        grad.mul_(shrink).add_(matmul_nt(powers.to(weight.dtype), columns.T))  # (n, C)
        largest = larger
    grad_hidden.copy_(grad.div_(total)[:n].sub_(own_weight))
    return (total.log_().add_(largest)[:n] - own).sum()
