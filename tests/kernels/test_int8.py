"""int8 rows: what rounding keeps, edge cases, and values that are the same in pieces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora.kernels import int8
from lora.kernels.int8 import quantise_int8, unpack_int8


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def values(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    rows, out = quantise_int8(weight), torch.empty(weight.shape, dtype=dtype)
    unpack_int8(rows.codes, rows.scales, out)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_is_off_by_at_most_half_a_step_of_its_row(dtype: torch.dtype) -> None:
    weight = (random(40, 96) * torch.logspace(-4, 4, 40)[:, None]).to(dtype)
    error = (values(weight) - weight.float()).abs()
    peak = weight.float().abs().amax(1, keepdim=True)
    assert (error <= peak / 127 * 0.5001).all()
    assert quantise_int8(weight).codes.abs().amax(1).eq(127).all()


def test_the_largest_value_of_a_row_stays_and_the_rest_is_rounded_to_even() -> None:
    weight = torch.tensor([[-127.0, 2.5, 3.5, 1.0], [1.0, -0.5, 0.25, 0.0]])
    assert quantise_int8(weight).codes.tolist() == [[-127, 2, 4, 1], [127, -64, 32, 0]]
    assert quantise_int8(-weight).codes.tolist() == [[127, -2, -4, -1], [-127, 64, -32, 0]]
    assert values(weight)[:, 0].tolist() == [-127.0, 1.0]


def test_rows_of_zeros_and_of_tiny_and_huge_values_stay_finite() -> None:
    weight = torch.zeros(3, 16)
    weight[1], weight[2, 3] = 1e-38, 1e38
    found = values(weight)
    assert found[0].eq(0).all()
    assert found[1].abs().lt(1e-30).all()
    assert found[2, 3] == pytest.approx(1e38, rel=1e-6)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_row_that_is_not_finite_has_a_scale_that_is_not_either(bad: float) -> None:
    weight = random(3, 8)
    weight[1, 5] = bad
    assert quantise_int8(weight).scales.isfinite().flatten().tolist() == [True, False, True]


def test_pieces_and_strides_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(31, 24, dtype=torch.bfloat16)
    whole, unpacked = quantise_int8(weight), values(weight, torch.bfloat16)
    monkeypatch.setattr(int8, "PIECE_ELEMENTS", 100)
    rows = quantise_int8(weight.T.contiguous().T)
    assert torch.equal(rows.codes, whole.codes)
    assert torch.equal(rows.scales, whole.scales)
    assert rows.codes.is_contiguous()
    # Into a part of a wider tensor, as LoRA's columns stand beside a weight.
    wide = torch.zeros(33, 30, dtype=torch.bfloat16)
    unpack_int8(rows.codes, rows.scales, wide[:31, :24])
    assert torch.equal(wide[:31, :24], unpacked)
    assert wide[31:].eq(0).all()
    assert wide[:, 24:].eq(0).all()
