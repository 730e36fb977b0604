"""Parameter groups, the rate's schedule, the size of a gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lora.config import TrainConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Return AdamW's groups: matrices decay; norms, biases and embeddings do not."""
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim >= 2 and id(p) not in embeddings]
    chosen = {id(p) for p in decayed}
    rest = [p for p in trainable if id(p) not in chosen]
    groups: list[dict[str, object]] = []
    if decayed:
        groups.append({"params": decayed, "weight_decay": weight_decay})
    if rest:
        groups.append({"params": rest, "weight_decay": 0.0})
    return groups


def build_optimizer(model: nn.Module, rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW (fused: one pass over each tensor) over what trains in `model`."""
    return torch.optim.AdamW(
        parameter_groups(model, weight_decay), lr=rate, betas=(0.9, 0.99), fused=True
    )


def rate_factor(step: int, config: TrainConfig) -> float:
    """Return the share of the peak rate at `step` (the first is 0): warm-up, then the schedule."""
    warmup_steps = round(config.warmup_fraction * config.steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, config.steps - warmup_steps)  # 0 to 1
    least = config.min_rate_fraction
    if config.schedule == "linear":
        return 1 - (1 - least) * progress
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Changes `optimizer` in place: every group takes `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def scale_and_clip(gradients: Iterable[Tensor], n_tokens: Tensor, max_norm: float) -> Tensor:
    """Changes `gradients` in place: sums over tokens become means, then at most `max_norm` long.

    `n_tokens` is () or (1,). Returns the norm of the mean gradient before clipping, ().
    """
    gradients = list(gradients)
    count = n_tokens.reshape(()).clamp(min=1)
    norm = torch.nn.utils.get_total_norm(gradients) / count
    factor = 1 / count
    if max_norm > 0:
        factor = factor * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor)
    return norm
