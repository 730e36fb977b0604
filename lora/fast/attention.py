"""Attention of the fast step: rows of one document, or documents packed into rows.

Both are torch's own kernels, followed by autograd here and nowhere else in the fast step. Queries,
keys and values come as views (N, heads, D) of one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Shape:
    """How N tokens are laid out, and who sees whom."""

    rows: int
    tokens: int
    scale: float
    window_tokens: int | None


class Attended:
    """One block's attention: its output, and the way back."""

    def __init__(self, output: Tensor, inputs: Gradients, result: Tensor) -> None:
        self._output, self._inputs = output, inputs
        self.result = result
        """(N, H, D)."""

    def backward(self, d_result: Tensor) -> Gradients:
        """Return the gradients of queries, keys and values, each (N, heads, D)."""
        if self._output.ndim == 4:  # (B, H, T, D)
            b, h, t, d = self._output.shape
            d_output = d_result.view(b, t, h, d).transpose(1, 2)
            grads = torch.autograd.grad(self._output, self._inputs, d_output)
            return tuple(g.transpose(1, 2).flatten(0, 1) for g in grads)  # type: ignore[return-value]
        return torch.autograd.grad(self._output, self._inputs, d_result)  # type: ignore[return-value]


def attend_rows(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Attended:
    """Attention where every row is one document without padding."""
    q, k, v = (_by_row(x, shape).requires_grad_() for x in (q, k, v))
    shared = q.shape[1] != k.shape[1]
    with torch.enable_grad():
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=shape.scale, enable_gqa=shared
        )  # (B, H, T, D)
    return Attended(y, (q, k, v), y.detach().transpose(1, 2).flatten(0, 1))


def attend_documents(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, shape: Shape) -> Attended:
    """Attention within documents whose `bounds` (documents + 1,) lie on a GPU."""
    q, k, v = (x.data.requires_grad_() for x in (q, k, v))
    window = -1 if shape.window_tokens is None else shape.window_tokens - 1
    with torch.enable_grad():
        y = torch.ops.aten._flash_attention_forward(
            q, k, v, bounds, bounds, shape.tokens, shape.tokens, 0.0, True, False,
            scale=shape.scale, window_size_left=window, window_size_right=0,
        )[0]  # (N, H, D)  # fmt: skip
    return Attended(y, (q, k, v), y.detach())


def attend_documents_plain(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, shape: Shape
) -> Attended:
    """The plain twin of `attend_documents`: one document after the other."""
    q, k, v = (x.data.requires_grad_() for x in (q, k, v))
    sizes = [size for size in bounds.diff().tolist() if size]  # the room beyond the last is empty
    with torch.enable_grad():
        parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
        y = torch.cat([_attend_document(*part, shape) for part in parts])  # (N, H, D)
    return Attended(y, (q, k, v), y.detach())


def _attend_document(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
    place = torch.arange(len(q), device=q.device)
    mask = place[:, None] >= place  # (n, n)
    if shape.window_tokens is not None:
        mask &= place[:, None] - place < shape.window_tokens
    shared = q.shape[1] != k.shape[1]
    heads = [x.transpose(0, 1)[None] for x in (q, k, v)]  # each (1, heads, n, D)
    return F.scaled_dot_product_attention(
        heads[0], heads[1], heads[2], mask, scale=shape.scale, enable_gqa=shared
    )[0].transpose(0, 1)  # (n, H, D)


def _by_row(x: Tensor, shape: Shape) -> Tensor:
    # .data, so that autograd does not take writes to other parts of the tensor for changes.
    return x.data.unflatten(0, (shape.rows, shape.tokens)).transpose(1, 2)  # (B, heads, T, D)
