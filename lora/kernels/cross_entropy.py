"""Output head and cross-entropy as one autograd function: all logits never exist at once.

What differs from the textbook: tokens without a target are taken out before the matmul; gradients
are computed in forward, chunk by chunk, while a chunk's logits are still there; and the softmax is
never normalised over (n, V): its matmul with the weight, which is (n, C), is divided instead. On a
CPU with a frozen weight the chunks are of the vocabulary (online softmax, arXiv 1805.02867): weight
and logits are read for the second time while they are in the cache. A bias, a factor and a cap of
the logits are optional. `plain_linear_cross_entropy` is the twin with full logits. A packed weight
is unpacked by such chunks, on any device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.errors import ModelError
from lora.kernels.matmul import matmul_nt, round_rows

IGNORE = -100
"""Label of a token without a target."""
CHUNK_TOKENS = 512
"""Tokens whose logits exist at once."""
CHUNK_COLUMNS = 6144
"""Of the vocabulary, on a CPU: their logits of 512 tokens are 12.6 MB, which stay in the cache."""
MIN_TOKENS_PER_PADDING = 16
"""On a CPU tokens are padded to a round count if that adds at most one in so many."""


@dataclass(frozen=True)
class LogitTransform:
    """What becomes of the head's logits z before the softmax: softcap · tanh(scale · z / softcap).

    Without a softcap it is scale · z.
    """

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, logits: Tensor) -> Tensor | None:
        """Changes `logits` in place; return the cap's slopes, or None without a cap.

        The gradient of `logits` as they were is that of the new ones, times slopes, times scale.
        """
        if self.scale != 1:
            logits.mul_(self.scale)
        if self.softcap is None:
            return None
        logits.div_(self.softcap).tanh_()
        slopes = 1 - logits.square()
        logits.mul_(self.softcap)
        return slopes


AS_THEY_ARE = LogitTransform()


class HeadRows(Protocol):
    """A frozen head's weight (V, C) that is not in memory: some of its rows are, when asked for."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""

    def __len__(self) -> int:
        """Return V."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the rows from `start` to `stop`."""

    def select(self, ids: Tensor) -> Tensor:
        """Return the rows `ids` (n,), as (n, C)."""


def plain_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = AS_THEY_ARE,
) -> tuple[Tensor, Tensor]:
    """The plain twin: from the logits (N, V) of all tokens."""
    logits = F.linear(hidden, weight, bias)  # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * (logits / transform.softcap).tanh()
    loss_sum = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return loss_sum, (labels != IGNORE).sum()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | HeadRows,
    labels: Tensor,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    bias: Tensor | None = None,
    transform: LogitTransform = AS_THEY_ARE,
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of hidden · weightᵀ, and how many tokens have a target.

    Args:
        hidden: (N, C), any floating type.
        weight: (V, C), of the same dtype; its gradient is computed only if it is required. Of
            HeadRows a slice is in memory at once.
        labels: (N,) int64, each 0 … V − 1, or −100 for a token without a target.
        chunk_tokens: at most chunk_tokens × V logits exist at once.
        bias: (V,), of the same dtype; added to the logits. With HeadRows it is frozen.
        transform: a factor and a cap of the logits.

    Returns the loss in nats () in fp32 (fp64 for fp64 inputs; so is the log-sum-exp) and the
    count () int64. Without a single target the loss and its gradients are zero.
    """
    is_learned = labels != IGNORE
    rows = is_learned.nonzero().squeeze(1)  # (n,); the host waits for the device: n is a shape
    learned = hidden if len(rows) == len(labels) else hidden.index_select(0, rows)  # (n, C)
    labels = labels if len(rows) == len(labels) else labels.index_select(0, rows)  # (n,)
    loss_sum = learned_cross_entropy(learned, weight, labels, chunk_tokens, bias, transform)
    return loss_sum, is_learned.sum()


def learned_cross_entropy(
    hidden: Tensor,
    weight: Tensor | HeadRows,
    labels: Tensor,
    chunk_tokens: int,
    bias: Tensor | None = None,
    transform: LogitTransform = AS_THEY_ARE,
) -> Tensor:
    """Return the summed cross-entropy () of tokens that all have a target; see above."""
    trains_bias = bias is not None and bias.requires_grad
    trains_head = trains_bias or (isinstance(weight, Tensor) and weight.requires_grad)
    if torch.is_grad_enabled() and (hidden.requires_grad or trains_head):
        if trains_bias and not isinstance(weight, Tensor):
            raise ModelError(
                "Cannot train the bias of a packed output head: by chunks of the vocabulary its "
                "gradient is not computed. Freeze the bias, or leave the head unpacked."
            )
        loss_sum: Tensor = _LinearCrossEntropy.apply(
            hidden, weight, labels, chunk_tokens, bias, transform
        )
        return loss_sum
    total = hidden.new_zeros((), dtype=_wide(hidden))
    for start in range(0, len(labels), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        if isinstance(weight, Tensor):
            total += _chunk_loss(hidden[part], weight, labels[part], bias, transform).loss
        else:
            total += _learn_columns(hidden[part], weight, labels[part], bias, transform, None)
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | HeadRows,
        labels: Tensor,
        chunk_tokens: int,
        bias: Tensor | None,
        transform: LogitTransform,
    ) -> Tensor:
        wide = _wide(hidden)
        loss_sum = hidden.new_zeros((), dtype=wide)
        needs_hidden, needs_weight, _, _, needs_bias, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = None
        if isinstance(weight, Tensor) and needs_weight:
            grad_weight = torch.zeros_like(weight, dtype=wide)
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs_bias else None
        trains_head = needs_weight or needs_bias
        for start in range(0, len(labels), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            into = None if grad_hidden is None else grad_hidden[part]
            own, others = hidden[part], (labels[part], bias, transform)
            if isinstance(weight, Tensor) and (not weight.is_cpu or into is None or trains_head):
                loss_sum += _learn_chunk(own, weight, *others, into, grad_weight, grad_bias)
            else:
                loss_sum += _learn_columns(own, weight, *others, into)
        # The gradients themselves, up to the factor that backward brings.
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight.dtype
        return loss_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grads[0].to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grads[0]).to(ctx.weight_dtype)
        if grad_bias is not None:
            grad_bias = (grad_bias * grads[0]).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, grad_bias, None


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@dataclass(frozen=True)
class _Chunk:
    """The softmax of some tokens, not normalised; fp32 or wider."""

    loss: Tensor
    """()"""
    powers: Tensor
    """exp(logits − max), (n, V)."""
    total: Tensor
    """Their sum over V, (n, 1)."""
    slopes: Tensor | None
    """Of a cap, (n, V)."""


def _chunk_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, transform: LogitTransform
) -> _Chunk:
    logits = matmul_nt(hidden, weight).to(_wide(hidden))  # (n, V)
    if bias is not None:
        logits += bias
    slopes = transform.apply(logits)
    logits -= logits.amax(1, keepdim=True)  # so that no power overflows
    of_label = logits.gather(1, labels[:, None])  # (n, 1)
    powers = logits.exp_()  # (n, V), in the same memory
    total = powers.sum(1, keepdim=True)  # (n, 1)
    return _Chunk((total.log() - of_label).sum(), powers, total, slopes)


def _learn_chunk(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> Tensor:
    """Return the chunk's loss; fill `grad_hidden` (n, C), add to `grad_weight` and `grad_bias`.

    d loss / d logits = powers / total − one-hot(label) is never formed, only its two matmuls are.
    """
    chunk = _chunk_loss(hidden, weight, labels, bias, transform)
    powers, total = chunk.powers, chunk.total
    own: Tensor | None = None  # (n, 1), the slope at the label
    if chunk.slopes is not None:
        powers *= chunk.slopes
        own = chunk.slopes.gather(1, labels[:, None])
    if grad_bias is not None:
        grad_bias.add_((powers / total).sum(0), alpha=transform.scale)
        ones = torch.ones_like(total) if own is None else own
        grad_bias.index_add_(0, labels, ones[:, 0], alpha=-transform.scale)
    powers = powers.to(weight.dtype)
    if grad_hidden is not None:
        grad = matmul_nt(powers, weight.T).to(total.dtype).div_(total)  # (n, C)
        _finish(grad, weight.index_select(0, labels), own, transform, grad_hidden)
    if grad_weight is not None:
        # Divided by the total on the narrow side, as above.
        wide = hidden.to(total.dtype)
        part = powers.T @ (wide / total).to(hidden.dtype)  # (V, C)
        grad_weight += part if transform.scale == 1 else part * transform.scale
        grad_weight.index_add_(
            0, labels, wide if own is None else wide * own, alpha=-transform.scale
        )
    return chunk.loss


def _finish(
    grad: Tensor, own_weight: Tensor, own: Tensor | None, transform: LogitTransform, into: Tensor
) -> None:
    """Fill `into` (n, C): the softmax's part `grad`, less the one-hot's part, times the scale.

    `own_weight` (n, C) and `own` (n, 1) are the head's row and the cap's slope of each label.
    """
    grad.sub_(own_weight if own is None else own_weight * own)
    into.copy_(grad if transform.scale == 1 else grad * transform.scale)


def _learn_columns(
    hidden: Tensor,
    weight: Tensor | HeadRows,
    labels: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    grad_hidden: Tensor | None,
) -> Tensor:
    """Return the loss of tokens (n, C) and fill `grad_hidden` (n, C), by chunks of the vocabulary.

    Sums are taken relative to the largest logit so far, and shrunk when a larger one comes.
    """
    n, wide = len(labels), _wide(hidden)
    own_weight = _rows_at(weight, labels)  # (n, C)
    own = (hidden.to(wide) * own_weight).sum(1, keepdim=True)  # (n, 1), their logits
    if bias is not None:
        own += bias.index_select(0, labels)[:, None]
    own_slopes = transform.apply(own)  # (n, 1)
    # oneDNN gets round row counts alone: a few rows of zeros cost less than the slower library.
    if 0 < round_rows(n) - n <= n // MIN_TOKENS_PER_PADDING:
        hidden = F.pad(hidden, (0, 0, 0, round_rows(n) - n))
    largest = hidden.new_full((len(hidden), 1), -torch.inf, dtype=wide)
    total = torch.zeros_like(largest)
    grad = torch.zeros_like(hidden, dtype=wide)
    for start in range(0, len(weight), CHUNK_COLUMNS):
        columns = _rows_from(weight, start)  # (columns, C)
        logits = matmul_nt(hidden, columns).to(wide)  # (n, columns)
        if bias is not None:
            logits += bias[start : start + CHUNK_COLUMNS]
        slopes = transform.apply(logits)
        larger = torch.maximum(largest, logits.amax(1, keepdim=True))  # (n, 1)
        shrink = (largest - larger).exp_()  # (n, 1), zero the first time: exp(−∞)
        powers = logits.sub_(larger).exp_()  # (n, columns)
        total.mul_(shrink).add_(powers.sum(1, keepdim=True))
        if slopes is not None:
            powers *= slopes
        if grad_hidden is not None:
            grad.mul_(shrink).add_(matmul_nt(powers.to(weight.dtype), columns.T))  # (n, C)
        largest = larger
    if grad_hidden is not None:
        _finish(grad.div_(total)[:n], own_weight, own_slopes, transform, grad_hidden)
    return (total.log_().add_(largest)[:n] - own).sum()


def _rows_at(weight: Tensor | HeadRows, ids: Tensor) -> Tensor:
    return weight.index_select(0, ids) if isinstance(weight, Tensor) else weight.select(ids)


def _rows_from(weight: Tensor | HeadRows, start: int) -> Tensor:
    """Return the rows of a chunk of the vocabulary."""
    stop = min(start + CHUNK_COLUMNS, len(weight))
    return weight[start:stop] if isinstance(weight, Tensor) else weight.rows(start, stop)
