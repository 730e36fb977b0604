"""Siblings of LoRALinear, and what can be wrapped at all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lora.errors import ConfigError, TargetError
from lora.layers.build import FusedLoRALinear, LoRAConv1D, build_lora_layer, is_adaptable, is_conv1d
from lora.lora_module import LoRALinear

NUMBERS: dict[str, Any] = {"rank": 3, "alpha": 6.0, "dropout": 0.0, "scaling": 2.0}


@pytest.fixture
def conv1d() -> nn.Module:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer = pytorch_utils.Conv1D(7, 12)  # 12 inputs, 7 outputs
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


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


def test_conv1d_rank_is_limited_by_its_smaller_side(conv1d: nn.Module) -> None:
    with pytest.raises(ConfigError, match="12 inputs and 7 outputs: allowed is an int from 1 to 7"):
        LoRAConv1D(conv1d, rank=8)


def test_the_layer_fits_the_base(conv1d: nn.Module) -> None:
    assert type(build_lora_layer(conv1d, **NUMBERS)) is LoRAConv1D
    layer = build_lora_layer(nn.Linear(8, 8), **NUMBERS)
    assert type(layer) is FusedLoRALinear
    assert layer.scaling == 2.0


def test_other_modules_are_refused() -> None:
    with pytest.raises(TargetError, match=r"type Embedding: allowed are nn.Linear and .*Conv1D"):
        build_lora_layer(nn.Embedding(3, 4), **NUMBERS)


class _OwnForward(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class _Renamed(nn.Linear):
    pass


def test_what_can_be_wrapped(conv1d: nn.Module) -> None:
    attention = nn.MultiheadAttention(8, 2)
    assert is_adaptable(nn.Linear(2, 2))
    assert is_adaptable(_Renamed(2, 2))
    assert is_adaptable(conv1d)
    assert not is_adaptable(_OwnForward(2, 2))  # quantised linears compute in their own way
    assert not is_adaptable(attention.out_proj)  # read without being called
    assert not is_adaptable(nn.Embedding(2, 2))
    assert not is_adaptable(LoRALinear(nn.Linear(2, 2), rank=1))


def test_a_linear_whose_weight_is_computed_cannot_be_wrapped() -> None:
    linear = nn.Linear(4, 4)
    parametrize.register_parametrization(linear, "weight", nn.Tanh())
    assert not is_adaptable(linear)


def test_a_linear_without_dropout_gets_the_fused_layer() -> None:
    kinds = {
        (dtype, dropout): type(
            build_lora_layer(
                nn.Linear(6, 4, dtype=dtype), rank=2, alpha=4.0, dropout=dropout, scaling=2.0
            )
        )
        for dtype in (torch.float32, torch.bfloat16)
        for dropout in (0.0, 0.1)
    }
    assert kinds[torch.float32, 0.0] is FusedLoRALinear
    assert set(kinds.values()) == {FusedLoRALinear, LoRALinear}
    assert kinds[torch.bfloat16, 0.0] is LoRALinear  # A and B are wider than W there


def test_training_through_either_layer_gives_the_same_curve() -> None:
    curves = []
    for kind in (LoRALinear, FusedLoRALinear):
        draw = torch.Generator().manual_seed(0)
        torch.manual_seed(1)
        parts = [kind(nn.Linear(12, 12), 3, generator=draw) for _ in range(3)]
        model = nn.Sequential(parts[0], nn.Tanh(), parts[1], nn.Tanh(), parts[2])
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 6
        optimizer = torch.optim.AdamW(trained, lr=3e-2)
        x = torch.randn(64, 12, generator=draw)
        y = torch.randn(64, 12, generator=draw)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < 0.9 * curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_the_fused_layer_merges_unwraps_and_copies_as_the_plain_one() -> None:
    torch.manual_seed(0)
    layer = FusedLoRALinear(nn.Linear(6, 4), 2)
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(3, 5, 6)
    y = layer(x).detach()
    torch.testing.assert_close(layer.merge()(x), y)
    assert layer.unwrap().weight is layer.weight
    torch.testing.assert_close(copy.deepcopy(layer)(x), y)
    assert isinstance(layer, LoRALinear)
