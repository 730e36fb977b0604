"""What LoRA can wrap, and the layer that each base gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lora.errors import TargetError
from lora.layers.build import build_lora_layer, is_adaptable
from lora.layers.conv1d import LoRAConv1D
from lora.layers.fused import FusedLoRALinear
from lora.lora_module import LoRALinear

NUMBERS: dict[str, Any] = {"rank": 3, "alpha": 6.0, "dropout": 0.0, "scaling": 2.0}


def test_the_layer_fits_the_base(conv1d: nn.Module) -> None:
    assert type(build_lora_layer(conv1d, **NUMBERS)) is LoRAConv1D
    layer = build_lora_layer(nn.Linear(8, 8), **NUMBERS)
    assert type(layer) is FusedLoRALinear
    assert layer.scaling == 2.0


def test_other_modules_are_refused() -> None:
    with pytest.raises(
        TargetError, match=r"type Embedding in LoRA. Allowed: nn.Linear and .*Conv1D"
    ):
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
