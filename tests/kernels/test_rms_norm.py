"""RMS norm as one autograd function agrees with torch's, and so do its gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora.kernels.rms_norm import plain_rms_norm, rms_norm


def relative(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm().clamp(min=1e-30)).item()


def both(
    x: Tensor, weight: Tensor, pull: Tensor, dtype: torch.dtype, *, fast: bool
) -> list[Tensor]:
    """The result and the gradients of x and weight."""
    x, weight = (t.to(dtype).requires_grad_() for t in (x, weight))
    y = (rms_norm if fast else plain_rms_norm)(x, weight, 1e-5)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), pull.to(dtype))]


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), max_size=2),
    width=st.integers(2, 33),
    size=st.sampled_from((1e-3, 1.0, 1e3)),
)
def test_agrees_with_torchs(shape: list[int], width: int, size: float) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(*shape, width, generator=generator, dtype=torch.float64) * size
    pull = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(width, generator=generator, dtype=torch.float64)
    for seen, wanted in zip(
        both(x, weight, pull, torch.float64, fast=True),
        both(x, weight, pull, torch.float64, fast=False),
        strict=True,
    ):
        torch.testing.assert_close(seen, wanted, rtol=1e-9, atol=1e-12 * size + 1e-12 / size)


@pytest.mark.parametrize("shape", [(512, 576), (4, 128, 64)])
def test_fp32_is_as_near_to_fp64_as_torchs(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, pull = (torch.randn(shape, generator=generator) for _ in range(2))
    weight = torch.randn(shape[-1], generator=generator)
    exact = both(x, weight, pull, torch.float64, fast=False)
    for seen, wanted in zip(both(x, weight, pull, torch.float32, fast=True), exact, strict=True):
        assert relative(seen.double(), wanted) <= 1e-6


def test_gradients_that_are_not_required_are_not_computed() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.rand(8)
    rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None
    assert weight.grad is None
    frozen, learned = torch.randn(3, 8), torch.rand(8, requires_grad=True)
    rms_norm(frozen, learned, 1e-5).sum().backward()
    assert learned.grad is not None
