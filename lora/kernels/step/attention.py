"""Causal attention within the documents of packed sequences, and where documents begin and end.

The plain twins of `lora.kernels.step.attention_triton`. Queries and keys lie side by side in one
tensor, values in another; where nothing but the rotation is between the projection and attention,
both are columns of the fused q/k/v tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora.kernels.step.rotary import RotaryTables, rotate_heads

Heads = tuple[int, int, int]
"""Query heads H, key/value heads (fewer where query heads share them), width of a head D."""


@dataclass(frozen=True)
class AttentionSettings:
    """How a token attends to its document."""

    heads: Heads
    scale: float
    """Multiplies the logits."""
    window_tokens: int = 0
    """That a token sees, itself included; 0: all of its document before it."""
    softcap: float = 0.0
    """The logits become softcap · tanh(logits / softcap); 0: they stay."""

    @property
    def split(self) -> int:
        """Columns of queries and keys together."""
        return (self.heads[0] + self.heads[1]) * self.heads[2]


def find_begins(position_ids: Tensor) -> Tensor:
    """Return the index of the first token of each token's document, (N,) int32.

    `position_ids` (N,) restart at 0 in each document and count up in it.
    """
    index = torch.arange(len(position_ids), device=position_ids.device)
    return (index - position_ids).to(torch.int32)


def find_ends(begins: Tensor) -> Tensor:
    """Return the index after the last token of each token's document, (N,) int32."""
    index = torch.arange(len(begins), device=begins.device, dtype=begins.dtype)
    # At least the token itself, whatever the position ids are.
    return torch.searchsorted(begins, begins, right=True).to(torch.int32).maximum(index + 1)


def document_attention(
    qk: Tensor, v: Tensor, begins: Tensor, settings: AttentionSettings
) -> Tensor:
    """Return the attention output (N, H·D), through operations that autograd can follow.

    `qk` (N, (H + heads) · D) holds the heads of queries, then of keys, side by side; `v` (N, heads
    · D) those of values.
    """
    # Document by document, not by a mask over all: 0 · NaN is NaN, so one document's NaN would
    # reach the others through a masked softmax.
    _, sizes = begins.unique_consecutive(return_counts=True)
    parts = zip(qk.split(sizes.tolist()), v.split(sizes.tolist()), strict=True)
    return torch.cat([_attend_one(*part, settings) for part in parts])


def _attend_one(qk: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
    n_heads, n_kv_heads, width = settings.heads
    q, k = qk.unflatten(1, (-1, width)).split((n_heads, n_kv_heads), 1)  # (n, heads, D)
    v = v.unflatten(1, (-1, width))
    k, v = (x.repeat_interleave(n_heads // n_kv_heads, 1) for x in (k, v))  # (n, H, D)
    index = torch.arange(len(qk), device=qk.device)
    sees = index <= index[:, None]  # (n, n)
    if settings.window_tokens:
        sees &= index[:, None] - index < settings.window_tokens
    logits = torch.einsum("qhd,khd->hqk", q, k) * settings.scale  # (H, n, n)
    if settings.softcap:
        logits = settings.softcap * torch.tanh(logits / settings.softcap)
    weights = logits.masked_fill(~sees, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)  # (n, H·D)


def attend(
    qk: Tensor, v: Tensor, begins: Tensor, settings: AttentionSettings, out: Tensor, lse: Tensor
) -> None:
    """Changes `out` (N, H·D) in place; the plain twin of `attend_triton`, which leaves `lse` as
    it is."""
    out.copy_(document_attention(qk, v, begins, settings))


def attend_gradients(
    qk: Tensor,
    v: Tensor,
    begins: Tensor,
    ends: Tensor,
    settings: AttentionSettings,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    partial: Tensor,
) -> None:
    """Changes `qk`, whose queries become their gradient, and `partial` (N, H, 2, D) in place.

    The plain twin of `attend_gradients_triton`, by autograd: all of dk and dv is in the first of
    the query heads that share them.
    """
    n_heads, shared, width = settings.heads
    # Copies, because `qk` is overwritten by its gradient.
    inputs = [x.detach().clone().requires_grad_() for x in (qk, v)]
    with torch.enable_grad():
        y = document_attention(inputs[0], inputs[1], begins, settings)
    d_qk, dv = torch.autograd.grad(y, inputs, d_out)
    qk[:, : n_heads * width] = d_qk[:, : n_heads * width]
    partial.zero_()
    firsts = partial[:, :: n_heads // shared]  # (N, heads, 2, D)
    firsts[:, :, 0] = d_qk[:, n_heads * width :].unflatten(1, (shared, width)).to(partial)
    firsts[:, :, 1] = dv.unflatten(1, (shared, width)).to(partial)


def attend_backward(
    qkv: Tensor,
    begins: Tensor,
    ends: Tensor,
    settings: AttentionSettings,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    partial: Tensor,
    tables: RotaryTables | None,
) -> None:
    """Changes `qkv` (N, W) in place; the plain twin of `attend_backward_triton`, by autograd."""
    # A copy, because `qkv` is overwritten by its gradient.
    inputs = qkv.detach().clone().requires_grad_()
    split = settings.split
    with torch.enable_grad():
        y = document_attention(inputs[:, :split], inputs[:, split:], begins, settings)
    qkv.copy_(torch.autograd.grad(y, inputs, d_out)[0])
    if tables is not None:  # a rotation's gradient is the rotation by the negative angle
        heads = settings.heads
        rotate_heads(qkv, tables[0], -tables[1], heads[0] + heads[1], heads[2])
