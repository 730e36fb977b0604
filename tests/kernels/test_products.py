"""Both libraries of a product agree, whichever takes it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.kernels import products
from lora.kernels.products import product, transposed_product


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    n_in=st.integers(1, 70),
    n_out=st.integers(1, 70),
    with_bias=st.booleans(),
    is_transposed=st.booleans(),
    is_large=st.booleans(),
)
def test_agrees_with_torchs_linear(
    rows: int, n_in: int, n_out: int, with_bias: bool, is_transposed: bool, is_large: bool
) -> None:
    generator = torch.Generator().manual_seed(rows + n_in + n_out)
    x = torch.randn(rows, n_in, generator=generator)
    weight = torch.randn(n_out, n_in, generator=generator)
    bias = torch.randn(n_out, generator=generator) if with_bias else None
    given_weight = weight.T.contiguous().T if is_transposed else weight
    with pytest.MonkeyPatch.context() as patch:
        if is_large:  # as if the sizes were those from which oneDNN takes over
            for name in ("LARGE_PRODUCT", "BIASED_PRODUCT", "SMALL_INPUT"):
                patch.setattr(products, name, 0)
        y = product(x, given_weight, bias)
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    # Against the sizes of what is added: a lone result may be a small difference of large ones.
    sizes = F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    assert y.shape == wanted.shape
    assert (y - wanted).norm() <= 1e-6 * sizes.norm()


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), rank=st.integers(1, 9), n=st.integers(1, 70), is_wide=st.booleans())
def test_transposed_products_agree(rows: int, rank: int, n: int, is_wide: bool) -> None:
    generator = torch.Generator().manual_seed(rows + rank + n)
    low = torch.randn(rows, rank, generator=generator)
    x = torch.randn(rows, n, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        if is_wide:
            patch.setattr(products, "WIDE", 1)
        y = transposed_product(low, x)
    wanted = low.double().T @ x.double()
    assert y.shape == wanted.shape
    assert (y - wanted).norm() <= 1e-6 * (low.abs().T @ x.abs()).norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_and_strides_go_to_torch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(600, 300).to(dtype), torch.randn(400, 300).to(dtype)
    assert torch.equal(product(x, weight), F.linear(x, weight))
    wide = torch.randn(400, 310)
    assert torch.equal(product(x.float(), wide[:, :300]), F.linear(x.float(), wide[:, :300]))
