"""The nf4 format: codes, scales and values are bitsandbytes', to the bit."""

from __future__ import annotations

from itertools import product

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from lora.config import NF4_BLOCKS
from lora.kernels import nf4
from lora.kernels.nf4 import Nf4Tensor, dynamic_levels, nf4_scales, quantise_nf4, unpack_nf4

SHAPES = ((64, 128), (100, 70), (37, 30), (1, 2), (3, 4098), (96, 1024))
"""With rows that begin inside a block, a last block that is shorter, and one block alone."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights(shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """Return usual weights, zeros, huge and tiny ones, all alike, and of many magnitudes."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    usual = drawn * 0.02
    usual[0], usual[-1, ::2] = 0.0, -0.0
    largest = 1e4 if dtype is torch.float16 else 1e34
    magnitudes = torch.logspace(-30, 3, shape[0])[:, None]
    constant = torch.full(shape, 0.37)
    found = (usual, drawn * 0, drawn * largest, drawn * 1e-42, constant, drawn * magnitudes)
    return [weight.to(dtype) for weight in found]


@pytest.mark.parametrize("block", NF4_BLOCKS)
@pytest.mark.parametrize("double", [True, False])
def test_codes_scales_and_values_are_those_of_bitsandbytes(block: int, double: bool) -> None:
    for shape, dtype in product(SHAPES, DTYPES):
        for weight in weights(shape, dtype):
            codes, state = bnb.quantize_4bit(
                weight, blocksize=block, compress_statistics=double, quant_type="nf4"
            )
            packed = quantise_nf4(weight, block, double_quant=double)
            assert torch.equal(packed.codes.view(-1), codes.view(-1))
            assert torch.equal(packed.scales, state.absmax)
            scales = state.absmax
            if double:
                assert torch.equal(packed.group_scales, state.state2.absmax)
                assert torch.equal(packed.offset, state.offset)
                scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
            assert torch.equal(nf4_scales(packed), scales)
            out = torch.empty(shape, dtype=dtype)
            unpack_nf4(packed, out)
            # Its own values are wrong where a block is longer than a row, and slow from 2048 on.
            if block <= shape[1] and block < 2048:
                expected = bnb.dequantize_4bit(codes, state).view(shape)
            else:
                expected = by_definition(packed, scales).to(dtype)
            assert torch.equal(out, expected)


def by_definition(packed: Nf4Tensor, scales: Tensor) -> Tensor:
    """Return level · scale of each value, one by one."""
    codes = torch.stack([packed.codes >> 4, packed.codes & 15], -1).view(-1).long()
    blocks = torch.arange(len(codes)) // packed.block
    return (torch.tensor(nf4.NF4_LEVELS)[codes] * scales[blocks]).view(packed.shape)


def test_the_8_bit_levels_are_those_of_bitsandbytes() -> None:
    assert torch.equal(dynamic_levels(torch.empty(0)), bnb.create_dynamic_map())


def test_codes_from_the_table_are_those_of_a_search() -> None:
    levels = torch.tensor(nf4.NF4_LEVELS)
    middles = (levels[:-1] + levels[1:]) / 2
    beside = [torch.nextafter(middles, torch.tensor(end)) for end in (-2.0, 2.0)]
    edges = torch.arange(nf4.N_CELLS + 1) * (2 / nf4.N_CELLS) - 1
    drawn = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    values = torch.cat([levels, middles, *beside, edges, drawn, torch.tensor([1.0000001])])
    expected = torch.bucketize(values, middles).to(torch.uint8)
    assert torch.equal(nf4.nearest_levels(values), expected)
    # Rounding moves a value across an edge by less than this, and no midpoint lies there.
    assert (edges[:, None] - middles).abs().min() > 1e-6


def test_a_weight_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights((300, 130), torch.bfloat16)[0]
    whole = quantise_nf4(weight)
    monkeypatch.setattr(nf4, "CPU_PIECE_VALUES", 4096)
    monkeypatch.setattr(nf4, "UNPACKED_VALUES", 1024)
    pieces = quantise_nf4(weight)
    for name in ("codes", "scales", "group_scales", "offset"):
        assert torch.equal(getattr(pieces, name), getattr(whole, name)), name
    out = torch.empty(300, 130)
    unpack_nf4(pieces, out)
    assert torch.equal(out, by_definition(whole, nf4_scales(whole)))


@pytest.mark.parametrize("width", [128, 70])
def test_rows_are_written_in_place_into_any_tensor(width: int) -> None:
    packed = quantise_nf4(weights((40, width), torch.float32)[0])
    whole = torch.empty(40, width)
    unpack_nf4(packed, whole)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        wider = torch.full((20, width + 3), 7.0, dtype=dtype)
        unpack_nf4(packed, wider[:11, 1 : width + 1], first_row=9)  # with a row stride
        assert torch.equal(wider[:11, 1 : width + 1], whole[9:20].to(dtype))
        assert (wider[11:] == 7).all()
        assert (wider[:, width + 1 :] == 7).all()
        unaligned = torch.empty(5 * width + 1, dtype=dtype)[1:].view(5, width)
        unpack_nf4(packed, unaligned, first_row=35)
        assert torch.equal(unaligned, whole[35:].to(dtype))


def test_scales_take_half_a_bit_a_value_and_an_eighth_when_quantised_too() -> None:
    weight = torch.randn(256, 4096, generator=torch.Generator().manual_seed(1))
    sizes = {}
    for double in (True, False):
        packed = quantise_nf4(weight, double_quant=double)
        tensors = (packed.codes, packed.scales, packed.group_scales, packed.offset)
        sizes[double] = sum(8 * t.nbytes for t in tensors) / weight.numel()
    assert sizes[False] == pytest.approx(4.5, abs=1e-4)
    assert sizes[True] == pytest.approx(4.127, abs=1e-3)  # arXiv 2305.14314, section 3
