"""FP8 rows: their precision, edge cases, and the plain matmul."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora.kernels.step.fp8 import (
    E4M3_MAX,
    FP8,
    Fp8Rows,
    quantise_rows,
    scaled_matmul,
    transpose_codes,
)


def code(x: Tensor, kind: torch.dtype = FP8, factors: Tensor | None = None) -> Fp8Rows:
    rows = Fp8Rows(x.new_empty(x.shape, dtype=kind), torch.empty(len(x), 1), factors)
    rows.write(x)
    return rows


def values(rows: Fp8Rows) -> Tensor:
    return rows.codes.double() * rows.scales.double()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_values_keep_three_bits_and_tiny_ones_an_absolute_error() -> None:
    x = random(64, 200) * torch.logspace(-20, 20, 64)[:, None]
    x[:, ::7] *= 1e-4
    peak = x.abs().amax(1, keepdim=True).double()
    error = (values(code(x)) - x.double()).abs()
    # Half of the last bit: relative 2⁻⁴, and 2⁻¹⁰ · scale where the code is subnormal.
    allowed = torch.maximum(x.double().abs() * 2**-4, peak / E4M3_MAX * 2**-10) * (1 + 1e-6)
    assert (error <= allowed).all()
    assert (error.norm(dim=1) / x.double().norm(dim=1) < 0.04).all()


def test_rows_of_zeros_and_of_tiny_values_stay_finite() -> None:
    x = torch.zeros(3, 16)
    x[1], x[2, 3] = 1e-38, 1e38
    rows = code(x)
    assert rows.scales.isfinite().all()
    assert (values(rows)[:2].abs() < 1e-30).all()
    assert values(rows)[2, 3] == pytest.approx(1e38, rel=1e-6)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x = random(2, 16)
    x[1, 5] = bad
    found = values(code(x))
    assert found[0].isfinite().all()
    assert found[1, 5].isnan()


def test_factors_multiply_columns_first() -> None:
    x, factors = random(5, 32), random(32, seed=1).abs()
    found = code(x, factors=factors)
    assert torch.equal(values(found), values(code(x * factors)))


def test_wide_codes_round_nothing() -> None:
    x = random(5, 32).double()
    rows = code(x, torch.float64)
    assert torch.equal(rows.codes, x)
    assert (rows.scales == 1).all()


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_scaled_matmul_is_that_of_the_values(with_bias: bool) -> None:
    x, weight = code(random(7, 48)), code(random(33, 48, seed=1))
    bias = random(33, seed=2) if with_bias else None
    out = torch.full((7, 40), 7.0)
    scaled_matmul(x, weight.codes, weight.scales.T, bias, out[:, :33])
    expected = values(x) @ values(weight).T + (0 if bias is None else bias.double())
    assert (out[:, :33].double() - expected).norm() / expected.norm() < 1e-6
    assert (out[:, 33:] == 7).all()
    exact = random(7, 48).double() @ random(33, 48, seed=1).double().T
    if bias is not None:
        exact += bias.double()
    assert 0.005 < (expected - exact).norm() / exact.norm() < 0.05


def test_transposing_moves_codes() -> None:
    weight = code(random(20, 33)).codes
    out = weight.new_empty(33, 20)
    transpose_codes(weight, out)
    assert torch.equal(out.float(), weight.float().T)


def test_quantising_writes_only_what_it_was_given() -> None:
    x = random(4, 16)
    whole = torch.zeros(6, 16, dtype=FP8)
    quantise_rows(x, Fp8Rows(whole[1:5], torch.empty(4, 1)))
    assert (whole[0].float() == 0).all()
    assert (whole[5].float() == 0).all()
