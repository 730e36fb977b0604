"""Groups, the rate's schedule, the size of the gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lora.adapters.apply import apply_lora
from lora.config import LoRAConfig, TrainConfig
from lora.training.optim import (
    build_optimizer,
    parameter_groups,
    scale_and_clip,
    schedule_factor,
    set_learning_rate,
)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


def test_only_matrices_decay() -> None:
    model = Toy()
    groups = {group["weight_decay"]: group["params"] for group in parameter_groups(model, 0.1)}
    assert [id(p) for p in groups[0.1]] == [id(model.linear.weight)]
    rest = {id(p) for p in groups[0.0]}
    others = (model.embedding.weight, model.linear.bias, *model.norm.parameters())
    assert rest == {id(p) for p in others}


def test_what_trains_whole_beside_lora_takes_its_share_of_the_rate() -> None:
    model = apply_lora(Toy(), LoRAConfig(rank=2, modules_to_save=("embedding",)))
    optimizer = build_optimizer(model, 1.0, 0.0, whole_rate_fraction=0.25)
    set_learning_rate(optimizer, 0.4)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates[id(model.linear.lora_A)] == rates[id(model.linear.lora_B)] == 0.4
    assert rates[id(model.embedding.weight)] == pytest.approx(0.1)
    assert len(rates) == 3  # nothing frozen is in it


def test_without_lora_everything_takes_the_whole_rate() -> None:
    optimizer = build_optimizer(Toy(), 0.5, 0.0, whole_rate_fraction=0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_rises_then_follows_its_schedule(schedule: str) -> None:
    config = TrainConfig(steps=100, warmup_fraction=0.1, schedule=schedule, min_rate_fraction=0.2)  # type: ignore[arg-type]
    factors = [schedule_factor(step, config) for step in range(100)]
    assert factors[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert factors[10] == 1.0
    middle = {"cosine": 0.6, "linear": 0.6, "constant": 1.0}[schedule]
    assert factors[55] == pytest.approx(middle)
    assert factors == factors[:10] + sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(1.0 if schedule == "constant" else 0.2, abs=0.02)


def test_without_warm_up_the_first_step_has_the_peak_rate() -> None:
    assert schedule_factor(0, TrainConfig(steps=10, warmup_fraction=0.0)) == 1.0


def test_gradients_become_means_and_are_clipped_together() -> None:
    gradients = [torch.full((2,), 30.0), torch.full((2,), 40.0)]
    norm = scale_and_clip(gradients, torch.tensor([10]), max_norm=0.0)
    assert norm.item() == pytest.approx(math.sqrt(2 * 9 + 2 * 16))
    assert gradients[0].tolist() == pytest.approx([3.0, 3.0])
    scale_and_clip(gradients, torch.tensor([1]), max_norm=1.0)
    together = torch.cat(gradients).norm().item()
    assert together == pytest.approx(1.0, rel=1e-5)
    small = [torch.tensor([0.5])]
    scale_and_clip(small, torch.tensor([1]), max_norm=1.0)
    assert small[0].item() == 0.5
