"""The optimizer update of K stacked adapters: AdamW for each, with the device deciding for each.

What differs from `lora.fast.weights.update`: loss, gradient norm, clipping and the finiteness check
are one for each adapter. One whose loss or gradient is not finite is stopped: that step is not
taken, nor any after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora.fast.weights.stacked_flat import StackedFlat
from lora.fast.weights.update import REPORT
from lora.kernels.step.adamw import STACKED_CONTROL_COLUMNS, AdamWSettings


class StackedUpdate:
    """AdamW (arXiv 1711.05101) on `flat`, which has been allocated.

    Args:
        flat: values, gradients and moments, (K, n).
        adamw: the operation, `lora.kernels.step.adamw.stacked_adamw` or its fast twin.
        weight_decays: of each adapter.
        max_grad_norms: of each adapter, for gradient clipping; 0: no clipping.
    """

    def __init__(
        self,
        flat: StackedFlat,
        adamw: Callable[..., None],
        *,
        weight_decays: Sequence[float],
        max_grad_norms: Sequence[float],
    ) -> None:
        self.flat, self.adamw, self.settings = flat, adamw, AdamWSettings()
        n, device = flat.n_adapters, flat.device

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.float32, device=device)

        self.decays = column(weight_decays)
        # Infinity where nothing is clipped: one formula for all adapters, without a branch.
        self.max_norms = column([norm or torch.inf for norm in max_grad_norms])  # (K,)
        self.learning_rates = column([0.0] * n)  # (K,)
        self.taken_steps = column([0.0] * n)
        self.is_live = torch.ones((), dtype=torch.bool, device=device)
        """False while a step is rehearsed for a capture: it changes nothing then."""
        self.is_alive = torch.ones(n, dtype=torch.bool, device=device)
        """(K,): false for an adapter that is stopped."""
        self.control = torch.zeros(n, STACKED_CONTROL_COLUMNS, dtype=torch.float32, device=device)
        self.loss_sums = torch.zeros(n, dtype=flat.dtype, device=device)
        self.n_learned = torch.zeros(n, dtype=torch.int64, device=device)
        self.report = torch.zeros(n, len(REPORT), dtype=torch.float32, device=device)
        """Loss, tokens, gradient norm, whether the step was taken, of each adapter, (K, 4)."""

    def set_learning_rate(self, lr: Sequence[float]) -> None:
        """Take the next step at these learning rates, one for each adapter."""
        rates = torch.tensor(list(lr), dtype=torch.float32)
        if self.learning_rates.is_cuda:
            rates = rates.pin_memory()  # else the host would wait for the copy
        self.learning_rates.copy_(rates, non_blocking=True)

    def count_tokens(self, losses: Tensor, is_learned: Tensor, *, first: bool) -> None:
        """Add a micro-batch's losses (K·N,), and which of its tokens have a target (K·N,)."""
        by_adapter = (self.flat.n_adapters, -1)
        sums = losses.view(by_adapter).sum(1)  # (K,)
        counts = is_learned.view(by_adapter).sum(1)  # (K,)
        if first:
            self.loss_sums.copy_(sums)
            self.n_learned.copy_(counts)
        else:
            self.loss_sums.add_(sums)
            self.n_learned.add_(counts)

    def run(self) -> None:
        """AdamW on each adapter's mean gradient, clipped to its norm, if all of it is finite."""
        flat = self.flat
        count = self.n_learned.clamp(min=1)  # (K,)
        norm = torch.linalg.vector_norm(flat.gradients, dim=1).float() / count  # (K,)
        loss = self.loss_sums.float() / count  # (K,)
        # Mean over target tokens and clipping as one factor, which AdamW applies as it reads: the
        # gradients are not rewritten.
        scale = (self.max_norms / (norm + 1e-6)).clamp(max=1.0) / count
        is_finite = torch.isfinite(norm + loss)  # one NaN or infinity makes the sum so, (K,)
        taken = is_finite & self.is_alive & self.is_live
        self.is_alive.logical_and_(is_finite | ~self.is_live)
        self.taken_steps.add_(taken)
        steps = self.taken_steps.clamp(min=1)  # 1 − β⁰ = 0 would divide a step not taken
        self.control.copy_(
            torch.stack((self.learning_rates, steps, scale, taken.float(), self.decays), 1)
        )
        self.adamw(flat.values, flat.gradients, flat.mean, flat.square, self.control, self.settings)
        self.report.copy_(torch.stack((loss, self.n_learned.float(), norm, taken.float()), 1))
