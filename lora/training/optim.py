"""AdamW's parameter groups, the learning-rate schedule, gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora.config import TrainConfig


def parameter_groups(
    model: nn.Module, weight_decay: float, whole_rate_fraction: float = 1.0
) -> list[dict[str, Any]]:
    """Return AdamW's groups: matrices decay; norms, biases and embeddings do not.

    Beside LoRA, fully trained modules (embeddings) take `whole_rate_fraction` of the learning rate:
    full weights want a lower one than A and B. A group has its own as `learning_rate_share`.
    """
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    of_lora = {name for name in named if name.endswith(("lora_A", "lora_B"))}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        is_embedding = id(parameter) in embeddings or name.endswith("token_rows")
        decays = parameter.ndim >= 2 and not is_embedding
        share = whole_rate_fraction if of_lora and name not in of_lora else 1.0
        key = (weight_decay if decays else 0.0, share)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "learning_rate_share": share}
        for (decay, share), parameters in groups.items()
    ]


def build_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, whole_rate_fraction: float = 1.0
) -> torch.optim.AdamW:
    """Return AdamW (fused: one pass over each tensor) over what trains in `model`."""
    return adamw(parameter_groups(model, weight_decay, whole_rate_fraction), learning_rate)


def adamw(groups: list[dict[str, Any]], learning_rate: float) -> torch.optim.AdamW:
    """Return AdamW over the groups that `parameter_groups` returned."""
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99), fused=True)
    set_learning_rate(optimizer, learning_rate)
    return optimizer


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Return the learning rate of the step that follows `step` steps (0: the first step's)."""
    return config.peak_learning_rate * schedule_factor(step, config)


def schedule_factor(step: int, config: TrainConfig) -> float:
    """Return the fraction of the peak learning rate after `step` steps: warm-up, then schedule."""
    warmup_steps = round(config.warmup_fraction * config.n_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, config.n_steps - warmup_steps)  # 0 to 1
    end = config.min_rate_fraction
    if config.schedule == "linear":
        return 1 - (1 - end) * progress
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Changes `optimizer` in place: every group takes its share of `learning_rate`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["learning_rate_share"]


@torch.no_grad()
def scale_and_clip(
    gradients: Iterable[Tensor], n_tokens: Tensor, max_norm: float, *, norm: Tensor | None = None
) -> Tensor:
    """Changes `gradients` in place: sums over tokens become means, clipped to norm `max_norm`.

    `n_tokens` is () or (1,); `norm` is that of the sums, (), if there are more than `gradients`.
    Returns the norm of the mean gradient before clipping, ().
    """
    gradients = list(gradients)
    count = n_tokens.reshape(()).clamp(min=1)  # a step may have nothing to learn from
    norm = (torch.nn.utils.get_total_norm(gradients) if norm is None else norm) / count
    factor = 1 / count
    if max_norm > 0:
        factor = factor * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor)
    return norm
