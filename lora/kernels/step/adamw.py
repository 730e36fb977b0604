"""AdamW (arXiv 1711.05101) over one flat buffer, of one adapter or of K stacked ones.

What differs from the textbook: learning rate, step, gradient scale and whether the step is taken
are read from the device, so that a captured step needs no host. A step that is not taken changes no
bit. With K adapters each has its own row of these values, so one whose step is not taken leaves the
others alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.kernels.step.jit import jit, tl

BLOCK = 1024
STACKED_CONTROL_COLUMNS = 5
"""Values in an adapter's row of `control`; weight decay is one of them there."""


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

    `control` is (4,): the learning rate, the number of this step (from 1), the gradient scale, and
    1 where the step is taken, 0 where it is not.
    """
    _update(parameters, gradients, mean, square, control.unbind(), weight_decay, settings)


def stacked_adamw(
    parameters: Tensor,
    gradients: Tensor,
    mean: Tensor,
    square: Tensor,
    control: Tensor,
    settings: AdamWSettings,
) -> None:
    """Changes `parameters`, `mean` and `square`, all (K, n), in place: one step where it is taken.

    `control` is (K, 5): for each adapter the four values of `adamw`, then its weight decay.
    """
    *values, decay = control[:, :, None].unbind(1)  # each (K, 1)
    _update(parameters, gradients, mean, square, tuple(values), decay, settings)


def _update(
    parameters: Tensor,
    gradients: Tensor,
    mean: Tensor,
    square: Tensor,
    control: tuple[Tensor, ...],
    weight_decay: float | Tensor,
    settings: AdamWSettings,
) -> None:
    lr, step, scale, taken = control
    b1, b2 = settings.beta1, settings.beta2
    grad = gradients * scale
    new_mean = mean.lerp(grad, 1 - b1)
    new_square = square * b2 + grad * grad * (1 - b2)
    size = (new_square / (1 - b2**step)).sqrt_().add_(settings.eps)
    moved = parameters * (1 - lr * weight_decay) - lr / (1 - b1**step) * new_mean / size
    # Chosen by a mask, not by `if`: the host must not read the device while a graph is captured.
    is_taken = taken > 0
    for tensor, value in ((parameters, moved), (mean, new_mean), (square, new_square)):
        tensor.copy_(torch.where(is_taken, value, tensor))


def adamw_host(
    parameters: Tensor,
    gradients: Tensor,
    mean: Tensor,
    square: Tensor,
    lr: float,
    step: float,
    weight_decay: float,
    settings: AdamWSettings,
) -> None:
    """The twin for CPUs: torch's fused AdamW, one pass over memory; agrees within 1e-6.

    Changes `parameters`, `mean` and `square`, all (n,), in place; `step` counts from 1.
    """
    # The operation itself: torch.optim's function around it takes five times as long as it does on
    # the few thousand numbers of a small model's adapters.
    torch._fused_adamw_(
        [parameters], [gradients], [mean], [square], [], [torch.tensor(step)],
        lr=lr, beta1=settings.beta1, beta2=settings.beta2, weight_decay=weight_decay,
        eps=settings.eps, amsgrad=False, maximize=False,
    )  # fmt: skip


@jit
def _updated(p, m, v, grad, lr, step, decay, beta1, beta2, log_beta1, log_beta2, eps):
    """Return parameters and moments after one step."""
    m = m + (grad - m) * (1 - beta1)
    v = v * beta2 + grad * grad * (1 - beta2)
    # β^step as an exponential, since the step is known to the device alone. In fp64: 1 − β² of a
    # first step has few digits left in fp32.
    wide = step.to(tl.float64)
    correction1 = 1 - tl.exp(wide * log_beta1)
    correction2 = 1 - tl.exp(wide * log_beta2)
    size = tl.sqrt(v / correction2.to(tl.float32)) + eps
    p = p * (1 - lr * decay) - lr / correction1.to(tl.float32) * m / size
    return p, m, v


@jit
def _adamw_kernel(
    parameters, gradients, mean, square, control, count, weight_decay,
    beta1, beta2, log_beta1, log_beta2, eps, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    taken = tl.load(control + 3)
    if taken > 0:  # else nothing is stored: a NaN among the gradients reaches no parameter
        lr, step, scale = tl.load(control), tl.load(control + 1), tl.load(control + 2)
        # 64-bit offsets: full fine-tuning of a few billion parameters exceeds 32 bits.
        at = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        inside = at < count
        grad = tl.load(gradients + at, mask=inside, other=0.0) * scale
        m = tl.load(mean + at, mask=inside, other=0.0)
        v = tl.load(square + at, mask=inside, other=0.0)
        p = tl.load(parameters + at, mask=inside, other=0.0)
        p, m, v = _updated(
            p, m, v, grad, lr, step, weight_decay, beta1, beta2, log_beta1, log_beta2, eps
        )
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


@jit
def _stacked_adamw_kernel(
    parameters, gradients, mean, square, control, count,
    beta1, beta2, log_beta1, log_beta2, eps, BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    adapter = tl.program_id(1)
    own = control + adapter * WIDTH
    taken = tl.load(own + 3)
    if taken > 0:
        lr, step, scale = tl.load(own), tl.load(own + 1), tl.load(own + 2)
        decay = tl.load(own + 4)
        column = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        inside = column < count
        # One row of the grid for each adapter: its `control` row holds for all of its columns.
        at = adapter.to(tl.int64) * count + column
        grad = tl.load(gradients + at, mask=inside, other=0.0) * scale
        m = tl.load(mean + at, mask=inside, other=0.0)
        v = tl.load(square + at, mask=inside, other=0.0)
        p = tl.load(parameters + at, mask=inside, other=0.0)
        p, m, v = _updated(p, m, v, grad, lr, step, decay, beta1, beta2, log_beta1, log_beta2, eps)
        tl.store(mean + at, m, mask=inside)
        tl.store(square + at, v, mask=inside)
        tl.store(parameters + at, p, mask=inside)


def stacked_adamw_triton(
    parameters: Tensor,
    gradients: Tensor,
    mean: Tensor,
    square: Tensor,
    control: Tensor,
    settings: AdamWSettings,
) -> None:
    """The fast twin of `stacked_adamw`; fp32, on a GPU: agrees within 1e-5."""
    adapters, count = parameters.shape
    _stacked_adamw_kernel[(-(-count // BLOCK), adapters)](
        parameters, gradients, mean, square, control, count,
        settings.beta1, settings.beta2, math.log(settings.beta1), math.log(settings.beta2),
        settings.eps, BLOCK_SIZE=BLOCK, WIDTH=STACKED_CONTROL_COLUMNS,
    )  # fmt: skip
