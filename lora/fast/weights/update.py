"""The optimizer update of a step: clipping and AdamW over the flat buffer, decided on the device.

What differs from the textbook: loss and gradients are checked for finiteness on the device, where a
step that is not finite becomes a step not taken; the host reads of it later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lora.distributed.world import ALONE, N_FLAGS, World
from lora.fast.weights.flat import FlatParameters
from lora.kernels.step.adamw import AdamWSettings, adamw, adamw_host

REPORT = ("loss", "tokens", "gradient_norm", "taken")
"""What the device reports of a step, in this order; "taken" is 0 or 1. With several processes what
they ask of each other follows."""
N_TOTALS = 2 + N_FLAGS
"""Numbers that several processes sum with their gradients: loss, target tokens, flags."""


class FlatUpdate:
    """AdamW (arXiv 1711.05101) on `flat`, which has been allocated.

    Args:
        flat: values, gradients and moments.
        adamw: the operation, `lora.kernels.step.adamw.adamw` or its fast twin.
        weight_decay: of matrices.
        max_grad_norm: for gradient clipping; 0: no clipping.
        world: processes whose gradients are summed; `flat` has room for N_TOTALS numbers then.
    """

    def __init__(
        self,
        flat: FlatParameters,
        adamw: Callable[..., None],
        *,
        weight_decay: float,
        max_grad_norm: float,
        world: World = ALONE,
    ) -> None:
        self.flat, self.adamw, self.world = flat, adamw, world
        self.weight_decay, self.max_grad_norm = weight_decay, max_grad_norm
        self.settings = AdamWSettings()
        device = flat.device
        # Scalars on the device: a captured step reads what the host put there before the launch.
        self.taken_steps = torch.zeros((), dtype=torch.float32, device=device)
        self.learning_rate = torch.zeros((), dtype=torch.float32, device=device)
        self.is_live = torch.ones((), dtype=torch.bool, device=device)
        """False while a step is rehearsed for a capture: it changes nothing then."""
        self.control = torch.zeros(4, dtype=torch.float32, device=device)
        self.loss_sum = torch.zeros((), dtype=flat.dtype, device=device)
        self.n_learned = torch.zeros((), dtype=torch.int64, device=device)
        if not world.is_alone:  # in fp32 counts are exact up to 16 million tokens per step
            self.loss_sum, self.n_learned = flat.totals[0], flat.totals[1]
        self.flags = flat.totals[2:]
        """What processes ask of each other, which the host writes before a step."""
        n_report = len(REPORT) + len(self.flags)
        self.report = torch.zeros(n_report, dtype=torch.float32, device=device)

    def set_learning_rate(self, lr: float) -> None:
        """Take the next step at this learning rate; what this process asks travels with it."""
        self.learning_rate.fill_(lr)  # a kernel with an immediate: no copy that the host waits for
        if self.world.is_alone:
            return
        self.flags.zero_()
        for index, number in enumerate(self.world.asked.numbers()):
            if number:
                self.flags[index].fill_(number)

    def sum_over_processes(self, what: str) -> None:
        """Changes gradients, loss, tokens and flags in place: they become the sums of all."""
        # Called between two graphs, never inside one: processes capture at different times.
        self.world.sum(self.flat.sums, what)

    def count_tokens(self, losses: Tensor, is_learned: Tensor, *, first: bool) -> None:
        """Add a micro-batch's losses (N,), and which of its tokens have a target (N,)."""
        self.count(losses.sum(), is_learned.sum(), first=first)

    def count(self, loss_sum: Tensor, n_learned: Tensor, *, first: bool) -> None:
        """Add a micro-batch's summed loss () and target tokens (); the `first` replaces both."""
        if first:
            self.loss_sum.copy_(loss_sum)
            self.n_learned.copy_(n_learned)
        else:
            self.loss_sum.add_(loss_sum)
            self.n_learned.add_(n_learned)

    def run(self) -> None:
        """AdamW on the mean gradient, clipped to `max_grad_norm`, if all is finite."""
        flat = self.flat
        count = self.n_learned.clamp(min=1)
        norm = torch.linalg.vector_norm(flat.gradients).float() / count
        loss = self.loss_sum.float() / count
        # Mean over target tokens and clipping as one factor, which AdamW applies as it reads: the
        # gradients are not rewritten.
        scale = 1 / count
        if self.max_grad_norm > 0:
            scale = scale * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        # The norm holds every gradient, so one NaN or infinity anywhere shows here.
        taken = torch.isfinite(norm + loss) & self.is_live
        self.taken_steps.add_(taken)
        steps = self.taken_steps.clamp(min=1)  # 1 − β⁰ = 0 would divide a step not taken
        self.control.copy_(torch.stack((self.learning_rate, steps, scale.float(), taken.float())))
        for part, decay, lr_fraction in flat.segments(self.weight_decay):
            # A copy on the device: the learning rate is not known to the host during a capture.
            control = self.control if lr_fraction == 1 else self._slower(lr_fraction)
            self.adamw(
                flat.values[part], flat.gradients[part], flat.mean[part], flat.square[part],
                control, decay, self.settings,
            )  # fmt: skip
        report = torch.stack((loss, self.n_learned.float(), norm, taken.float()))
        self.report.copy_(report if self.world.is_alone else torch.cat((report, self.flags)))

    def _slower(self, lr_fraction: float) -> Tensor:
        """Return `control` with this fraction of the learning rate."""
        control = self.control.clone()
        control[0] *= lr_fraction
        return control

    def optimizer_state(self, model: nn.Module) -> dict[str, dict[str, Tensor]]:
        """Return AdamW's state by parameter name, with the keys of torch.optim.AdamW.

        Moments are views of the flat ones in each parameter's shape; all share one step count.
        """
        values, size = self.flat.values, self.flat.values.element_size()
        state = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # A trained parameter is a view of `values`: its moments lie at the same offset.
                start = (parameter.data_ptr() - values.data_ptr()) // size
                shape, strides = parameter.shape, parameter.stride()
                state[name] = {
                    "step": self.taken_steps,
                    "exp_avg": self.flat.mean.as_strided(shape, strides, start),
                    "exp_avg_sq": self.flat.square.as_strided(shape, strides, start),
                }
        return state

    def load_optimizer_state(
        self, model: nn.Module, saved: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """Changes moments and number of steps in place; what is not in `saved` stays."""
        for name, own in self.optimizer_state(model).items():
            for key, tensor in saved.get(name, {}).items():
                own[key].copy_(tensor)


class HostUpdate(FlatUpdate):
    """The same on a CPU, with torch's fused AdamW: the host reads the norm and decides."""

    def __init__(self, flat: FlatParameters, *, weight_decay: float, max_grad_norm: float) -> None:
        super().__init__(flat, adamw, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        # Views made once: of a small model's adapters they take as long as the step itself.
        tensors = flat.values, flat.gradients, flat.mean, flat.square
        self.segments = [
            ([tensor[part] for tensor in tensors], decay, lr_fraction)
            for part, decay, lr_fraction in flat.segments(weight_decay)
        ]

    def run(self) -> None:
        # On a CPU nothing is captured: reading values costs no wait, and a mask would be a pass.
        flat, count = self.flat, max(1, int(self.n_learned))
        norm = torch.linalg.vector_norm(flat.gradients).item() / count
        loss = self.loss_sum.item() / count
        taken = math.isfinite(norm + loss)
        if taken:
            clipped = (
                min(1.0, self.max_grad_norm / (norm + 1e-6)) if self.max_grad_norm > 0 else 1.0
            )
            flat.gradients.mul_(clipped / count)
            self.taken_steps.add_(1)
            lr, step = self.learning_rate.item(), self.taken_steps.item()
            for (values, gradients, mean, square), decay, lr_fraction in self.segments:
                adamw_host(
                    values, gradients, mean, square, lr * lr_fraction, step, decay, self.settings
                )
        self.report.copy_(torch.tensor((loss, count, norm, float(taken))))
