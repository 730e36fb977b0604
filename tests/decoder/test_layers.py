"""Norms against their formula; low precision is normalised in fp32."""

from __future__ import annotations

import pytest
import torch

from lora.decoder.families import ACTIVATION_NAMES
from lora.decoder.layers import ACTIVATIONS, OffsetRMSNorm, RMSNorm


def make_norm(kind: type[RMSNorm], dtype: torch.dtype) -> tuple[RMSNorm, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    norm = kind(16, 1e-3).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16, generator=generator))
    return norm, torch.randn(3, 5, 16, generator=generator).to(dtype)


@pytest.mark.parametrize(("kind", "offset"), [(RMSNorm, 0.0), (OffsetRMSNorm, 1.0)])
def test_norms_follow_their_formula(kind: type[RMSNorm], offset: float) -> None:
    norm, x = make_norm(kind, torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (offset + norm.weight)
    assert norm(x).dtype == torch.float64
    assert torch.allclose(norm(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [RMSNorm, OffsetRMSNorm])
def test_bf16_is_normed_in_fp32(kind: type[RMSNorm]) -> None:
    norm, x = make_norm(kind, torch.bfloat16)
    narrow = norm(x)
    wide = norm.float()(x.float())
    assert narrow.dtype == torch.bfloat16
    # One rounding of the result and one of the factor, 2⁻⁹ each.
    assert ((narrow.float() - wide).abs() <= 2**-8 * wide.abs() + 1e-6).all()


def test_every_activation_that_is_allowed_is_there() -> None:
    assert set(ACTIVATIONS) == set(ACTIVATION_NAMES)


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_activations_agree_with_transformers(name: str) -> None:
    activations = pytest.importorskip("transformers.activations")
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    assert torch.allclose(ACTIVATIONS[name](x), activations.ACT2FN[name](x), atol=1e-12)
