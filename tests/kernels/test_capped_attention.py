"""Capped attention in chunks agrees with its plain twin, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora.kernels.capped_attention import capped_attention, plain_capped_attention

B, H, HEADS, D = 2, 6, 2, 8
SCALE, SOFTCAP = 0.7, 3.0  # logits of ±10 and more: the cap bends most of them


def drawn(n_queries: int, n_keys: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (B, H, n_queries, D), (B, HEADS, n_keys, D), (B, HEADS, n_keys, D)
    drawn = [torch.randn(shape, generator=generator).to(dtype) * 2 for shape in shapes]
    return [x.requires_grad_() for x in drawn]


def causal(n_queries: int, n_keys: int) -> Tensor:
    return torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)[None, None]


def window() -> Tensor:
    rows = causal(9, 9) & torch.ones(9, 9, dtype=torch.bool).triu(-2)
    return torch.cat([rows, causal(9, 9)])  # a mask of its own for each sequence


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk_queries", [1, 4, 9])
@pytest.mark.parametrize(
    ("sizes", "mask", "is_causal"),
    [
        ((9, 9), None, True),
        ((1, 9), None, False),
        ((3, 9), causal(3, 9), False),
        ((9, 9), window(), False),
    ],
)
def test_chunks_equal_the_plain_twin(
    sizes: tuple[int, int],
    mask: Tensor | None,
    is_causal: bool,
    chunk_queries: int,
    dtype: torch.dtype,
) -> None:
    inputs = drawn(*sizes, dtype)
    plain_mask = causal(*sizes) if is_causal else mask
    reference = plain_capped_attention(*inputs, plain_mask, SCALE, SOFTCAP)
    ours = capped_attention(
        *inputs,
        mask,
        SCALE,
        SOFTCAP,
        is_causal=is_causal,
        max_chunk_logits=chunk_queries * B * H * sizes[1],
    )
    dy = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = [reference, *torch.autograd.grad(reference, inputs, dy)]
    found = [ours, *torch.autograd.grad(ours, inputs, dy)]
    tolerance = 1e-6 if dtype is torch.float32 else 1e-14
    for one, other in zip(found, wanted, strict=True):
        assert ((one - other).norm() / other.norm()).item() < tolerance


def test_half_precision_keeps_logits_in_fp32() -> None:
    inputs = drawn(9, 9, torch.bfloat16)
    ours = capped_attention(*inputs, None, SCALE, SOFTCAP, is_causal=True)
    wide = plain_capped_attention(*(x.float() for x in inputs), causal(9, 9), SCALE, SOFTCAP)
    assert ours.dtype is torch.bfloat16
    assert ((ours.float() - wide).norm() / wide.norm()).item() < 5e-3


def test_autocast_computes_in_its_dtype() -> None:
    inputs = drawn(9, 9, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = capped_attention(*inputs, None, SCALE, SOFTCAP, is_causal=True)
    assert ours.dtype is torch.bfloat16
    (ours.float().sum()).backward()
    assert inputs[0].grad is not None
    assert inputs[0].grad.dtype is torch.float32
