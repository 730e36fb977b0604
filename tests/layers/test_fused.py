"""The fused LoRA linear against the plain one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora.layers.fused import FusedLoRALinear
from lora.lora_module import LoRALinear


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
