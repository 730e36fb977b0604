"""The LoRA linear as one operation agrees with the plain one, gradients included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora.kernels.linear import lora_linear, plain_lora_linear


def relative(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm().clamp(min=1e-30)).item()


def compare(
    rows: tuple[int, ...], sizes: tuple[int, int, int], with_bias: bool, dtype: torch.dtype
) -> dict[str, float]:
    n_in, n_out, rank = sizes
    generator = torch.Generator().manual_seed(sum(rows) + sum(sizes))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    weight, bias = draw(n_out, n_in), draw(n_out) if with_bias else None
    start = {"x": draw(*rows, n_in), "a": draw(rank, n_in), "b": draw(n_out, rank)}
    pull = draw(*rows, n_out)
    results = []
    for function in (plain_lora_linear, lora_linear):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
        y = function(leaves["x"], weight, bias, leaves["a"], leaves["b"], 1.7)
        (y * pull).sum().backward()
        results.append({"y": y.detach(), **{n: t.grad for n, t in leaves.items()}})
    plain, fast = results
    return {name: relative(fast[name], plain[name]) for name in plain}


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    n_in=st.integers(1, 33),
    n_out=st.integers(1, 33),
    rank=st.integers(1, 8),
    with_bias=st.booleans(),
)
def test_outputs_and_gradients_agree_in_fp64(
    rows: tuple[int, ...], n_in: int, n_out: int, rank: int, with_bias: bool
) -> None:
    errors = compare(rows, (n_in, n_out, rank), with_bias, torch.float64)
    assert max(errors.values()) <= 1e-12, errors


@pytest.mark.parametrize("with_bias", [True, False])
def test_they_agree_in_fp32_at_a_usual_size(with_bias: bool) -> None:
    errors = compare((4, 64), (256, 512, 8), with_bias, torch.float32)
    assert max(errors.values()) <= 1e-5, errors


def test_nothing_flows_to_the_frozen_weight_and_inputs_without_gradient_stay_so() -> None:
    weight, x = torch.randn(4, 3), torch.randn(2, 3)
    a, b = torch.randn(2, 3, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    lora_linear(x, weight, None, a, b, 1.0).sum().backward()
    assert x.grad is None
    assert weight.grad is None
    assert a.grad is not None
