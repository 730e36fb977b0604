"""K adapters on one frozen layer: they train, or answer, together.

What differs from the textbook: the rows of all adapters go through the frozen product at once, and
adapter k's low-rank part is batch element k of a batched product, over its own rows only. No sum
runs over two adapters, forward or backward, so a NaN in one leaves the bits of the others alone.
Smaller ranks are padded with zero rows of A and columns of B, whose gradients are masked to zero.

The rows of a stacked batch are those of adapter 0, then those of adapter 1, and so on: (K·B, …).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.errors import ConfigError, ModelError
from lora.lora_module import check_lora_numbers


@dataclass
class Stack:
    """What the stacked layers of one model share."""

    seeds: Sequence[int]
    """One for each adapter, of its dropout."""
    batch_size: int = 0
    """B of the batch that is computed; only tables that are read without a batch need it."""
    generators: list[torch.Generator] = field(init=False)

    def __post_init__(self) -> None:
        # Each adapter draws from its own generator what torch's global one would give it alone.
        self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]

    @property
    def n_adapters(self) -> int:
        """K."""
        return len(self.seeds)


class StackedLoRALinear(nn.Module):
    """y = x Wᵀ + b + (dropout(x) A_kᵀ) B_kᵀ · scaling_k for the rows of each adapter k.

    `lora_A` is (K, R, I) and `lora_B` (K, O, R), R the largest rank; both in fp32 or wider.

    Args:
        base: the linear; its parameters are taken over and frozen.
        stack: what the model's stacked layers share.
        ranks, scalings, dropouts: one for each adapter.

    Raises ConfigError for numbers out of range.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    scaling: Tensor
    padding: Tensor

    def __init__(
        self,
        base: nn.Linear,
        stack: Stack,
        ranks: Sequence[int],
        scalings: Sequence[float],
        dropouts: Sequence[float],
    ) -> None:
        super().__init__()
        _check_lengths(stack, ranks, scalings, dropouts)
        self.in_features, self.out_features = base.in_features, base.out_features
        for rank, scaling, dropout in zip(ranks, scalings, dropouts, strict=True):
            check_lora_numbers(self.in_features, self.out_features, rank, scaling, dropout)
        self.stack, self.ranks, self.dropouts = stack, tuple(ranks), tuple(dropouts)
        self.weight = base.weight.requires_grad_(False)  # type: ignore[assignment]
        self.register_parameter("bias", base.bias)
        if base.bias is not None:
            base.bias.requires_grad_(False)
        n, most = stack.n_adapters, max(ranks)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(self.weight.new_zeros(n, most, self.in_features, dtype=wide))
        self.lora_B = nn.Parameter(self.weight.new_zeros(n, self.out_features, most, dtype=wide))
        padding = torch.arange(most) >= torch.tensor(self.ranks)[:, None]  # (K, R)
        device = self.weight.device
        self.register_buffer("scaling", torch.tensor(scalings, dtype=wide, device=device))
        self.register_buffer("padding", padding.to(device))
        if bool(padding.any()):
            self.lora_A.register_hook(lambda grad: grad.masked_fill(self.padding[:, :, None], 0))
            self.lora_B.register_hook(lambda grad: grad.masked_fill(self.padding[:, None, :], 0))
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:  # (K·B, ..., I) or (K, B, ..., I) -> (..., O)
        y = F.linear(x, self.weight, self.bias)  # (..., O)
        rows = self._drop(self._by_adapter(x)).to(self.lora_A.dtype)  # (K, N, I)
        low = torch.bmm(rows, self.lora_A.mT)  # (K, N, R)
        scaled = torch.bmm(low, self.lora_B.mT) * self.scaling[:, None, None]  # (K, N, O)
        return y + scaled.view_as(y).to(y.dtype)

    def unwrap(self) -> nn.Linear:
        """Return the plain linear, sharing `weight` and `bias`."""
        with torch.device("meta"):  # no storage: both parameters are replaced at once
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight, linear.bias = self.weight, self.bias  # type: ignore[assignment]
        return linear.train(self.training)

    @torch.no_grad()
    def fill(self, k: int, a: Tensor, b: Tensor) -> None:
        """Changes adapter `k` in place: `a` (R_k, I), `b` (O, R_k); its padding becomes zero."""
        rank = self.ranks[k]
        self.lora_A[k].zero_()[:rank].copy_(a)
        self.lora_B[k].zero_()[:, :rank].copy_(b)

    def adapter(self, k: int) -> tuple[Tensor, Tensor]:
        """Return views of adapter `k`'s A (R_k, I) and B (O, R_k), without padding."""
        rank = self.ranks[k]
        return self.lora_A.detach()[k, :rank], self.lora_B.detach()[k, :, :rank]

    def _by_adapter(self, x: Tensor) -> Tensor:
        n_adapters = self.stack.n_adapters
        if len(x) % n_adapters:
            raise ModelError(
                f"{len(x)} rows were given to {n_adapters} stacked adapters: each needs as many. "
                "Stack the adapters' batches along the first axis."
            )
        return x.reshape(n_adapters, -1, self.in_features)  # (K, N, I)

    def _drop(self, rows: Tensor) -> Tensor:
        if not self.training or not any(self.dropouts):
            return rows
        # As nn.Dropout draws on a CPU, adapter by adapter.
        noise = torch.ones(rows.shape, dtype=rows.dtype)
        for k, (share, draw) in enumerate(zip(self.dropouts, self.stack.generators, strict=True)):
            if share:
                noise[k].bernoulli_(1 - share, generator=draw).div_(1 - share)
        return rows * noise.to(rows.device)


class FusedStackedLoRALinear(StackedLoRALinear):
    """StackedLoRALinear without dropout as one operation: fewer passes, less kept.

    Agrees with it within 1e-5 in fp32, outputs and gradients (‖difference‖ / ‖reference‖).
    """

    def forward(self, x: Tensor) -> Tensor:  # (K·B, ..., I) -> (K·B, ..., O)
        rows = self._by_adapter(x)  # (K, N, I)
        tensors = self.weight, self.bias, self.lora_A, self.lora_B, self.scaling
        y = _StackedLoRALinear.apply(rows, *tensors)  # (K, N, O)
        return y.view(*x.shape[:-1], self.out_features)  # (K·B, ..., O)


class _StackedLoRALinear(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.bfloat16)
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: Tensor,
    ) -> Tensor:
        scaling = scaling[:, None, None]  # (K, 1, 1)
        low = torch.bmm(x, a.mT).mul_(scaling)  # (K, N, R)
        y = F.linear(x.flatten(0, 1), weight, bias).view(*x.shape[:2], -1)  # (K, N, O)
        y.baddbmm_(low, b.mT)
        ctx.save_for_backward(x, low, weight, a, b, scaling)
        return y

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, a, b, scaling = ctx.saved_tensors
        dy = grads[0].contiguous()  # (K, N, O)
        dlow = torch.bmm(dy, b).mul_(scaling)  # (K, N, R)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy.flatten(0, 1) @ weight).view_as(x)  # (K, N, I)
            dx.baddbmm_(dlow, a)
        da = torch.bmm(dlow.mT, x)  # (K, R, I)
        db = torch.bmm(dy.mT, low)  # (K, O, R)
        return dx, None, None, da, db, None


class StackedEmbedding(nn.Module):
    """K copies of an embedding that train apart: `weight` is (K, V, C).

    Tokens (K·B, T) are looked up in their own adapter's table. Ids without a batch dimension, (T,),
    as of learned positions, give the same rows of each adapter's table to each of its B sequences,
    (K·B, T, C), with B from `stack.batch_size`.
    """

    def __init__(self, base: nn.Embedding, stack: Stack) -> None:
        super().__init__()
        self.stack, self.base = stack, [base]  # in a list: no submodule, its weight is not ours
        repeated = base.weight.detach().expand(stack.n_adapters, -1, -1)  # (K, V, C)
        self.weight = nn.Parameter(repeated.clone())
        self.train(base.training)

    def forward(self, ids: Tensor) -> Tensor:  # (K·B, T) or (T,) -> (K·B, T, C)
        # By two indices: the weight may be a view whose adapters do not lie side by side.
        own = torch.arange(len(self.weight), device=ids.device)[:, None]  # (K, 1)
        if ids.ndim == 1:
            shared = self.weight[own, ids]  # (K, T, C)
            return shared.repeat_interleave(self._batch_size(), dim=0)  # (K·B, T, C)
        by_adapter = ids.unflatten(0, (len(own), -1))  # (K, B, T)
        return self.weight[own[:, :, None], by_adapter].flatten(0, 1)  # (K·B, T, C)

    def unwrap(self) -> nn.Embedding:
        """Return the embedding as it was."""
        return self.base[0]

    def _batch_size(self) -> int:
        if self.stack.batch_size < 1:
            raise ModelError(
                "A stacked table was read without a batch, and stack.rows_each is not set: set it "
                "to the rows of one adapter before the forward."
            )
        return self.stack.batch_size


def build_stacked_linear(
    base: nn.Linear,
    stack: Stack,
    ranks: Sequence[int],
    scalings: Sequence[float],
    dropouts: Sequence[float],
) -> StackedLoRALinear:
    """Return the stacked layer that fits: fused in fp32 or fp64 without dropout, else plain."""
    is_wide = base.weight.dtype in (torch.float32, torch.float64)
    fused = is_wide and not any(dropouts)
    kind = FusedStackedLoRALinear if fused else StackedLoRALinear
    return kind(base, stack, ranks, scalings, dropouts)


def _check_lengths(stack: Stack, *lists: Sequence[float]) -> None:
    seen = [len(values) for values in lists]
    if not stack.n_adapters or seen != [stack.n_adapters] * len(lists):
        raise ConfigError(
            f"{stack.n_adapters} adapters were to be stacked, with {seen[0]} ranks, {seen[1]} "
            f"scalings and {seen[2]} dropouts: each adapter needs one of each."
        )
