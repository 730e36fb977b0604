"""LoRA on transformers' Conv1D."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora.layers.conv1d import LoRAConv1D, is_conv1d

NUMBERS: dict[str, Any] = {"rank": 3, "alpha": 6.0, "dropout": 0.0, "scaling": 2.0}


@pytest.fixture
def adapted(conv1d: nn.Module) -> LoRAConv1D:
    layer = LoRAConv1D(conv1d, **NUMBERS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def test_conv1d_forward_is_the_formula(adapted: LoRAConv1D) -> None:
    x = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(2))
    assert adapted.bias is not None
    expected = x @ adapted.weight + adapted.bias + x @ adapted.lora_A.T @ adapted.lora_B.T * 2.0
    torch.testing.assert_close(adapted(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv1d_at_the_start_is_the_base_to_the_bit(conv1d: nn.Module, dtype: torch.dtype) -> None:
    x = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = conv1d.to(dtype)(x)
    layer = LoRAConv1D(conv1d, **NUMBERS | {"dropout": 0.5}).eval()
    assert torch.equal(layer(x), expected)


def test_conv1d_merged_is_a_conv1d_with_the_same_output(adapted: LoRAConv1D) -> None:
    x = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(2))
    before = adapted.weight.clone()
    merged = adapted.merge()
    assert is_conv1d(merged)
    assert (merged(x) - adapted(x)).norm() / adapted(x).norm() <= 1e-6
    assert torch.equal(adapted.weight, before)


def test_conv1d_unwrapped_shares_its_parameters(conv1d: nn.Module) -> None:
    weight, bias = conv1d.weight, conv1d.bias
    plain = LoRAConv1D(conv1d, **NUMBERS).unwrap()
    assert type(plain) is type(conv1d)
    assert plain.weight is weight
    assert plain.bias is bias


def test_conv1d_gradients_reach_a_and_b_only(adapted: LoRAConv1D) -> None:
    adapted(torch.ones(3, 12)).square().sum().backward()
    assert [n for n, p in adapted.named_parameters() if p.grad is not None] == ["lora_A", "lora_B"]


def test_a_conv1d_may_have_a_rank_above_its_smaller_side(conv1d: nn.Module) -> None:
    layer, x = LoRAConv1D(conv1d, rank=8), torch.ones(3, 12)
    torch.nn.init.normal_(layer.lora_B)
    torch.testing.assert_close(layer.merge()(x), layer(x), rtol=1e-4, atol=1e-4)
