"""Three adapters of different ranks on one linear: their settings, and what tests of them share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lora.stacked.layers import StackedLoRALinear

RANKS, SCALINGS, SEEDS = (2, 5, 1), (2.0, 0.4, 3.0), (7, 8, 9)
NO_DROPOUT, DROPOUTS = (0.0, 0.0, 0.0), (0.1, 0.0, 0.5)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return normally distributed values in fp64, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def check_others_keep_their_bits(together: Callable[[], StackedLoRALinear]) -> None:
    """NaN in the inputs of one adapter and infinity in its B change no bit of the two others."""
    seen = []
    for is_broken in (False, True):
        layer = together()
        x = draw(6, 4, layer.in_features, seed=3).float()
        if is_broken:
            x[2:4] = math.nan
            with torch.no_grad():
                layer.lora_B[1] = math.inf
        x.requires_grad_()
        y = layer(x)
        (y**2).sum().backward()
        parts = (y.detach().view(3, 2, 4, -1), x.grad.view(3, 2, 4, -1))  # type: ignore[union-attr]
        seen.append([*parts, layer.lora_A.grad, layer.lora_B.grad])
    for whole, broken in zip(*seen, strict=True):
        assert torch.equal(whole[[0, 2]], broken[[0, 2]])
        assert not broken[1].isfinite().all()
