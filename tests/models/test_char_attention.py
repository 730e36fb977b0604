"""Attention by batched matmuls agrees with torch's, and so does its gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models.char_attention import DenseAttention, Scratch, Sizes


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 3),
    tokens=st.integers(1, 9),
    heads=st.integers(1, 4),
    width=st.integers(1, 6),
)
def test_agrees_with_torchs_attention(rows: int, tokens: int, heads: int, width: int) -> None:
    generator = torch.Generator().manual_seed(rows + tokens + heads + width)
    columns = heads * width
    qkv = torch.randn(rows * tokens, 3 * columns, generator=generator, dtype=torch.float64)
    pull = torch.randn(rows * tokens, columns, generator=generator, dtype=torch.float64)
    leaf = qkv.clone().requires_grad_()
    split = leaf.view(rows, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
    wanted = F.scaled_dot_product_attention(*split.unbind(0), is_causal=True)
    wanted = wanted.transpose(1, 2).reshape(rows * tokens, columns)
    (wanted * pull).sum().backward()
    sizes = Sizes(rows, tokens, heads, width, qkv.dtype)
    attention = DenseAttention(sizes, Scratch(sizes))
    out, gradient = torch.empty_like(wanted), torch.empty_like(qkv)
    for into_out, into_gradient in ((None, None), (out, gradient)):
        seen = attention.forward(qkv, into_out)
        torch.testing.assert_close(seen, wanted.detach(), rtol=1e-10, atol=1e-12)
        back = attention.backward(pull, into_gradient)
        torch.testing.assert_close(back, leaf.grad, rtol=1e-9, atol=1e-12)
    assert seen.data_ptr() == out.data_ptr()
    assert back.data_ptr() == gradient.data_ptr()
