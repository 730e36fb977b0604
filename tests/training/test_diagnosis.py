"""Where NaN comes from: weights, a layer, a row, a gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lora.training.diagnosis import find_nonfinite

Pair = tuple[Tensor, Tensor]


def loss(model: nn.Module, batch: Pair) -> Pair:
    x, y = batch
    error = (model(x) - y).square().sum()
    return error[None], torch.tensor([len(x)])


class RootOfZero(nn.Module):
    """Finite at 0, with an infinite slope there."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().sqrt() * 2


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def batch(rows: int = 5) -> Pair:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(rows, 3, generator=draw), torch.zeros(rows, 2)


def test_a_damaged_weight_is_named(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[2].weight[1, 1] = math.nan
    found = find_nonfinite(model, [batch()], loss)
    assert "weights themselves are not finite: 2.weight" in found.sentence
    assert not found.is_of_data


def test_the_first_layer_and_the_rows_are_named(model: nn.Sequential) -> None:
    x, y = batch()
    x[1, 2], x[3, 0] = math.inf, math.nan
    found = find_nonfinite(model, [batch(), (x, y)], loss)
    assert "first in 0 (sequence 2, 4 of 5), micro-batch 2 of 2" in found.sentence
    assert found.sequences == ((1, 1), (1, 3))


def test_a_loss_of_its_own_is_named(model: nn.Sequential) -> None:
    x, y = batch()
    y[0, 0] = math.nan
    found = find_nonfinite(model, [(x, y)], loss)
    assert "first in the loss itself, micro-batch 1 of 1" in found.sentence
    assert found.sequences == ()
    assert found.is_of_data


def test_a_gradient_is_named_and_none_is_left() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False), RootOfZero())
    with torch.no_grad():
        model[0].weight.zero_()
    found = find_nonfinite(model, [batch()], loss)
    assert "The loss is finite; its gradient is not, first in 0.weight" in found.sentence
    assert model[0].weight.grad is None


def test_nothing_is_made_up(model: nn.Sequential) -> None:
    found = find_nonfinite(model, [batch()], loss)
    assert "did not appear again when the batch was run module by module" in found.sentence
