"""AdamW (arXiv 1711.05101) over one flat buffer, with the device deciding whether to move.

What differs from the textbook: rate, step, scale and whether the step is taken are read from the
device, so that a captured step needs no host; a step that is not taken changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.kernels.step.jit import jit, tl

BLOCK = 1024


@dataclass(frozen=True)
class AdamWSettings:
    """AdamW's constants."""

    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8


def adamw(
    parameters: Tensor,
    gradients: Tensor,
    mean: Tensor,
    square: Tensor,
    control: Tensor,
    weight_decay: float,
    settings: AdamWSettings,
) -> None:
    """Changes `parameters`, `mean` and `square`, all (n,), in place: one step, if it is taken.

    `control` is (4,): the rate, the number of this step (from 1), the gradients' scale, and 1 where
    the step is taken, 0 where it is not.
    """
    rate, step, scale, taken = control.unbind()
    b1, b2 = settings.beta1, settings.beta2
    grad = gradients * scale
    new_mean = mean.lerp(grad, 1 - b1)
    new_square = square * b2 + grad * grad * (1 - b2)
    size = (new_square / (1 - b2**step)).sqrt_().add_(settings.eps)
    moved = parameters * (1 - rate * weight_decay) - rate / (1 - b1**step) * new_mean / size
    is_taken = taken > 0
    for tensor, value in ((parameters, moved), (mean, new_mean), (square, new_square)):
        tensor.copy_(torch.where(is_taken, value, tensor))


def adamw_host(
    parameters: Tensor,
    gradients: Tensor,
    mean: Tensor,
    square: Tensor,
    rate: float,
    step: float,
    weight_decay: float,
    settings: AdamWSettings,
) -> None:
    """The twin for CPUs: torch's fused AdamW, one pass; agrees within 1e-6.

    Changes `parameters`, `mean` and `square`, all (n,), in place; `step` counts from 1.
    """
    # The operation itself: torch.optim's function around it takes five times as long as it does on
    # the few thousand numbers of a small model's adapters.
    torch._fused_adamw_(
        [parameters], [gradients], [mean], [square], [], [torch.tensor(step)],
        lr=rate, beta1=settings.beta1, beta2=settings.beta2, weight_decay=weight_decay,
        eps=settings.eps, amsgrad=False, maximize=False,
    )  # fmt: skip


@jit
def _adamw_kernel(
    parameters, gradients, mean, square, control, count, weight_decay,
    beta1, beta2, log_beta1, log_beta2, eps, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    taken = tl.load(control + 3)
    if taken > 0:
        rate, step, scale = tl.load(control), tl.load(control + 1), tl.load(control + 2)
        at = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        inside = at < count
        grad = tl.load(gradients + at, mask=inside, other=0.0) * scale
        m = tl.load(mean + at, mask=inside, other=0.0)
        v = tl.load(square + at, mask=inside, other=0.0)
        p = tl.load(parameters + at, mask=inside, other=0.0)
        m = m + (grad - m) * (1 - beta1)
        v = v * beta2 + grad * grad * (1 - beta2)
        # Powers in fp64: 1 − β² of a first step has few digits left in fp32.
        wide = step.to(tl.float64)
        correction1 = 1 - tl.exp(wide * log_beta1)
        correction2 = 1 - tl.exp(wide * log_beta2)
        size = tl.sqrt(v / correction2.to(tl.float32)) + eps
        p = p * (1 - rate * weight_decay) - rate / correction1.to(tl.float32) * m / size
        tl.store(mean + at, m, mask=inside)
        tl.store(square + at, v, mask=inside)
        tl.store(parameters + at, p, mask=inside)


def adamw_triton(
    parameters: Tensor,
    gradients: Tensor,
    mean: Tensor,
    square: Tensor,
    control: Tensor,
    weight_decay: float,
    settings: AdamWSettings,
) -> None:
    """The fast twin of `adamw`; fp32, on a GPU: agrees within 1e-5."""
    count = parameters.numel()
    _adamw_kernel[(-(-count // BLOCK),)](
        parameters, gradients, mean, square, control, count, weight_decay,
        settings.beta1, settings.beta2, math.log(settings.beta1), math.log(settings.beta2),
        settings.eps, BLOCK_SIZE=BLOCK,
    )  # fmt: skip
