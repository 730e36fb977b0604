"""LoRA linears over packed weights against plain ones with the unpacked values."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from lora.kernels.linear import plain_lora_linear
from lora.kernels.nf4 import quantise_nf4, unpack_nf4
from lora.kernels.packed_linear import PackedLinear, packed_lora_linears
from lora.kernels.unpack.matmul import unpacked_nf4


def layers_of(count: int, draw: torch.Generator) -> tuple[list[PackedLinear], list[Tensor]]:
    """Return linears of 24 inputs in fp64, and their weights; every second one has a bias."""
    found, weights = [], []
    for index in range(count):
        n_out, rank = 10 + 2 * index, 3 + index
        packed = quantise_nf4(torch.randn(n_out, 24, generator=draw), 32)
        a = torch.randn(rank, 24, generator=draw, dtype=torch.float64, requires_grad=True)
        b = torch.randn(n_out, rank, generator=draw, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(n_out, generator=draw, dtype=torch.float64) if index % 2 else None
        unpack = partial(unpacked_nf4, block=32)
        found.append(PackedLinear(packed.tensors, unpack, bias, a, b, 0.5 + index))
        weights.append(torch.empty(n_out, 24, dtype=torch.float64))
        unpack_nf4(packed, weights[-1])
    return found, weights


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("needs_dx", [True, False])
def test_outputs_and_gradients_are_those_of_plain_linears(count: int, needs_dx: bool) -> None:
    draw = torch.Generator().manual_seed(count)
    layers, weights = layers_of(count, draw)
    x = torch.randn(2, 5, 24, generator=draw, dtype=torch.float64, requires_grad=needs_dx)
    trained = [t for layer in layers for t in (layer.a, layer.b)] + ([x] if needs_dx else [])
    outputs = packed_lora_linears(x, layers)
    expected = [
        plain_lora_linear(x, weight, m.bias, m.a, m.b, m.scaling)
        for m, weight in zip(layers, weights, strict=True)
    ]
    directions = [torch.randn(y.shape, generator=draw, dtype=torch.float64) for y in expected]
    for y, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(y, other, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(outputs, trained, directions)
    for gradient, other in zip(
        gradients, torch.autograd.grad(expected, trained, directions), strict=True
    ):
        torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-12)
