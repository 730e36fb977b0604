"""The LoRA linear as one autograd function agrees with the plain one, gradients included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora.kernels.linear import AdaptedLinear, lora_linear, lora_linears, plain_lora_linear


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


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    n_in=st.integers(1, 33),
    sizes=st.lists(st.tuples(st.integers(1, 33), st.integers(1, 8)), min_size=1, max_size=3),
    with_bias=st.booleans(),
)
def test_linears_together_agree_with_each_alone(
    rows: int, n_in: int, sizes: list[tuple[int, int]], with_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(rows + n_in)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    frozen = [(draw(n_out, n_in), draw(n_out) if with_bias else None) for n_out, _ in sizes]
    start = [draw(2, rows, n_in)]
    for n_out, rank in sizes:
        start += [draw(rank, n_in), draw(n_out, rank)]
    pulls = [draw(2, rows, n_out) for n_out, _ in sizes]
    found = []
    for together in (True, False):
        x, *trained = (tensor.clone().requires_grad_() for tensor in start)
        layers = [
            AdaptedLinear(weight, bias, a, b, 0.5 + index)
            for index, ((weight, bias), a, b) in enumerate(
                zip(frozen, trained[::2], trained[1::2], strict=True)
            )
        ]
        if together:
            outputs = lora_linears(x, layers)
        else:
            outputs = [plain_lora_linear(x, *_values(layer)) for layer in layers]
        sum((y * pull).sum() for y, pull in zip(outputs, pulls, strict=True)).backward()
        found.append([*outputs, x.grad, *(tensor.grad for tensor in trained)])
    for fast, plain in zip(*found, strict=True):
        assert relative(fast, plain) <= 1e-12


def _values(layer: AdaptedLinear) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float]:
    return layer.weight, layer.bias, layer.a, layer.b, layer.scaling


def test_together_they_agree_in_fp32_at_a_usual_size() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    frozen = [draw(n_out, 576) for n_out in (576, 192, 192)]
    start = [draw(512, 576)]
    for weight in frozen:
        start += [draw(8, 576), draw(len(weight), 8)]
    pulls = [draw(512, len(weight)) for weight in frozen]
    found = []
    for together, dtype in ((True, torch.float32), (False, torch.float64)):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in start]
        layers = [
            AdaptedLinear(weight.to(dtype), None, a, b, 2.0)
            for weight, a, b in zip(frozen, leaves[1::2], leaves[2::2], strict=True)
        ]
        outputs = (
            lora_linears(leaves[0], layers) if together
            else [plain_lora_linear(leaves[0], *_values(layer)) for layer in layers]
        )  # fmt: skip
        loss = sum((y * p.to(dtype)).sum() for y, p in zip(outputs, pulls, strict=True))
        loss.backward()
        found.append([*outputs, *(leaf.grad for leaf in leaves)])
    for fast, exact in zip(*found, strict=True):
        assert relative(fast.double(), exact) <= 1e-5


def test_outputs_may_be_changed_in_place() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 3, 4, generator=generator), torch.randn(6, 4, generator=generator)
    a, b = torch.randn(2, 4, generator=generator), torch.randn(6, 2, generator=generator)
    layer = AdaptedLinear(w, None, a.requires_grad_(), b.requires_grad_(), 1.5)
    outputs = [
        plain_lora_linear(x, w, None, a, b, 1.5),
        lora_linear(x, w, None, a, b, 1.5),
        *(lora_linears(x, [layer, layer])[index] for index in range(2)),
    ]
    grads = [torch.autograd.grad(y.clamp_(min=0).mul_(2).sum(), [a, b]) for y in outputs]
    for da, db in grads[1:]:
        assert relative(da, grads[0][0]) <= 1e-5
        assert relative(db, grads[0][1]) <= 1e-5
