"""The end of a fast step: AdamW over the flat parameters, with the device deciding.

What differs from the textbook: whether loss and gradient are finite is looked at where they are; a
step that is not finite becomes a step not taken, and the host reads of it later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lora.fast.weights.flat import FlatParameters
from lora.kernels.step.adamw import AdamWSettings, adamw, adamw_host

REPORT = ("loss", "tokens", "gradient_norm", "taken")
"""What the device reports of a step, in this order."""


class FlatUpdate:
    """AdamW (arXiv 1711.05101) on `flat`, which has been allocated.

    Args:
        flat: values, gradients and moments.
        adamw: the operation, `lora.kernels.step.adamw.adamw` or its fast twin.
        weight_decay: of matrices.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them alone.
    """

    def __init__(
        self,
        flat: FlatParameters,
        adamw: Callable[..., None],
        *,
        weight_decay: float,
        max_grad_norm: float,
    ) -> None:
        self.flat, self.adamw = flat, adamw
        self.weight_decay, self.max_grad_norm = weight_decay, max_grad_norm
        self.settings = AdamWSettings()
        device = flat.device
        self.taken_steps = torch.zeros((), dtype=torch.float32, device=device)
        self.rate = torch.zeros((), dtype=torch.float32, device=device)
        self.is_live = torch.ones((), dtype=torch.bool, device=device)
        """False while a step is only rehearsed: it changes nothing then."""
        self.control = torch.zeros(4, dtype=torch.float32, device=device)
        self.loss_sum = torch.zeros((), dtype=flat.dtype, device=device)
        self.n_learned = torch.zeros((), dtype=torch.int64, device=device)
        self.report = torch.zeros(len(REPORT), dtype=torch.float32, device=device)

    def set_learning_rate(self, rate: float) -> None:
        """Take the next step at this rate."""
        self.rate.fill_(rate)

    def count_tokens(self, losses: Tensor, is_learned: Tensor, *, first: bool) -> None:
        """Add a micro-batch's losses (N,) and which of its tokens are learned (N,)."""
        self.count(losses.sum(), is_learned.sum(), first=first)

    def count(self, loss_sum: Tensor, n_learned: Tensor, *, first: bool) -> None:
        """Add a micro-batch's loss () and learned tokens (); the `first` of a step begins anew."""
        if first:
            self.loss_sum.copy_(loss_sum)
            self.n_learned.copy_(n_learned)
        else:
            self.loss_sum.add_(loss_sum)
            self.n_learned.add_(n_learned)

    def run(self) -> None:
        """AdamW on the mean gradient, scaled to `max_grad_norm`, if all is finite."""
        flat = self.flat
        count = self.n_learned.clamp(min=1)
        norm = torch.linalg.vector_norm(flat.gradients).float() / count
        loss = self.loss_sum.float() / count
        scale = 1 / count
        if self.max_grad_norm > 0:
            scale = scale * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        taken = torch.isfinite(norm + loss) & self.is_live
        self.taken_steps.add_(taken)
        steps = self.taken_steps.clamp(min=1)
        self.control.copy_(torch.stack((self.rate, steps, scale.float(), taken.float())))
        for part, decay, share in flat.segments(self.weight_decay):
            control = self.control if share == 1 else self._slower(share)
            self.adamw(
                flat.values[part], flat.gradients[part], flat.mean[part], flat.square[part],
                control, decay, self.settings,
            )  # fmt: skip
        self.report.copy_(torch.stack((loss, self.n_learned.float(), norm, taken.float())))

    def _slower(self, share: float) -> Tensor:
        """Return `control` with this share of the rate."""
        control = self.control.clone()
        control[0] *= share
        return control

    def optimizer_state(self, model: nn.Module) -> dict[str, dict[str, Tensor]]:
        """Return AdamW's state by parameter name, keys as torch.optim.AdamW's: views of the flat
        moments in each parameter's shape, and one number of steps for all."""
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
    """The same on a CPU, with torch's fused AdamW: the host looks at the norm and decides."""

    def __init__(self, flat: FlatParameters, *, weight_decay: float, max_grad_norm: float) -> None:
        super().__init__(flat, adamw, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        # Views made once: of a small model's adapters they take as long as the step itself.
        tensors = flat.values, flat.gradients, flat.mean, flat.square
        self.parts = [
            ([tensor[part] for tensor in tensors], decay, share)
            for part, decay, share in flat.segments(weight_decay)
        ]

    def run(self) -> None:
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
            rate, step = self.rate.item(), self.taken_steps.item()
            for (values, gradients, mean, square), decay, share in self.parts:
                adamw_host(
                    values, gradients, mean, square, rate * share, step, decay, self.settings
                )
        self.report.copy_(torch.tensor((loss, count, norm, float(taken))))
