"""Attention within documents that lie one after the other, by where each begins: no mask exists.

An attention function for transformers' table of them. On a GPU it is torch's FlashAttention over
documents of any length, whose bounds stay on the device; elsewhere one document after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.pretrained.transformers_models.quiet import quiet

BOUNDED = "lora_within_bounds"
UNMASKED = "lora_unmasked_sdpa"
FLASH_DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM, ROUND_HEAD_DIM = 256, 8
"""Widths of a head that FlashAttention takes: multiples of 8 up to 256."""


@contextmanager
def attention_within(theirs: Any, bounds: Tensor, max_tokens: int) -> Iterator[None]:
    """Inside the context `theirs` attends causally within `bounds`, of documents ≤ `max_tokens`.

    Raises ValueError for a model whose attention cannot be replaced.
    """

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        dropout: float = 0.0,
        **settings: Any,
    ) -> tuple[Tensor, None]:
        width = query.shape[-1]
        if dropout or width > MAX_HEAD_DIM or width % ROUND_HEAD_DIM or width != value.shape[-1]:
            raise ValueError("attention within bounds has no dropout, and heads of 8 to 256")
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (N, heads, D)
        scale = width**-0.5 if scaling is None else float(scaling)
        run = _flash if q.is_cuda else _one_by_one
        y = run(q, k, v, bounds, max_tokens, scale, sliding_window)  # (N, H, D)
        return y.unflatten(0, (query.shape[0], -1)), None  # (B, T, H, D)

    with _attention(theirs, BOUNDED, attend):
        yield


@contextmanager
def unmasked_attention(theirs: Any) -> Iterator[None]:
    """Inside the context `theirs` attends causally, each sequence one document, without masks."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    with _attention(theirs, UNMASKED, sdpa_attention_forward):
        yield


@contextmanager
def _attention(theirs: Any, name: str, function: Any) -> Iterator[None]:
    from transformers import AttentionInterface

    # Through the model's own method, which also sets it in the configs of sub-models. Masks are
    # built by the name of the attention: under an unknown name transformers builds none.
    before = theirs.config._attn_implementation
    AttentionInterface.register(name, function)
    with quiet():  # some architectures have one attention, and warn that it stays
        theirs.set_attn_implementation(name)
    try:
        yield
    finally:
        with quiet():
            theirs.set_attn_implementation(before)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    if q.dtype not in FLASH_DTYPES:  # autocast, which does not know this operation
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    y: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, longest, longest, 0.0, True, False,
        scale=scale, window_size_left=-1 if window is None else window - 1, window_size_right=0,
    )[0]  # fmt: skip
    return y


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    sizes = [size for size in bounds.diff().tolist() if size]
    parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    return torch.cat([_attend_one(*part, scale, window) for part in parts])


def _attend_one(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    index = torch.arange(len(q), device=q.device)
    mask = index[:, None] >= index  # (n, n)
    if window is not None:
        mask &= index[:, None] - index < window
    heads = [x.transpose(0, 1)[None] for x in (q, k, v)]  # each (1, heads, n, D)
    y = F.scaled_dot_product_attention(
        heads[0], heads[1], heads[2], mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y[0].transpose(0, 1)  # (n, H, D)
