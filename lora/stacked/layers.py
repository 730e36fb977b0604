"""Layers with K stacked adapters on one frozen weight.

What differs from the textbook: one matmul applies the frozen weight to the sequences of all
adapters, and the low-rank part of adapter k is batch element k of two batched matmuls, over its own
sequences only. No sum runs over two adapters, forward or backward, so a NaN in one does not change
a bit of the others. Smaller ranks are padded with zero rows of A and zero columns of B, whose
gradients are masked to zero.

A stacked batch holds the sequences of adapter 0, then those of adapter 1, and so on: (K·B, …).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.decoder.quantised.base import QuantisedWeight
from lora.errors import ConfigError, ModelError
from lora.kernels.linear import shaped_as
from lora.lora_module import check_lora_numbers


@dataclass
class Stack:
    """State that all stacked layers of one model share."""

    seeds: Sequence[int]
    """Of dropout, one for each adapter."""
    batch_size: int = 0
    """B of the current batch, of one adapter. Only embeddings read by ids without a batch dimension
    need it."""
    generators: list[torch.Generator] = field(init=False)

    def __post_init__(self) -> None:
        # Each adapter has its own generator, so that its masks are those that torch's global one
        # would give it if it trained alone.
        self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]

    @property
    def n_adapters(self) -> int:
        """Number of adapters, K."""
        return len(self.seeds)


class StackedLoRALinear(nn.Module):
    """y = x Wᵀ + b + (dropout(x) A_kᵀ) B_kᵀ · scaling_k for the sequences of each adapter k.

    `lora_A` is (K, R, I) and `lora_B` (K, O, R), R the largest rank; both in fp32 or wider.

    Args:
        base: the linear; its parameters are shared, not copied, and frozen.
        stack: the state that the model's stacked layers share.
        ranks, scalings, dropouts: one for each adapter.

    Raises ConfigError for numbers out of range.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    scaling: Tensor
    padding: Tensor

    def __init__(
        self,
        base: nn.Linear | QuantisedWeight,
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
        n, max_rank = stack.n_adapters, max(ranks)
        wide = torch.float64 if self.weight.dtype is torch.float64 else torch.float32
        self.lora_A = nn.Parameter(self.weight.new_zeros(n, max_rank, self.in_features, dtype=wide))
        self.lora_B = nn.Parameter(
            self.weight.new_zeros(n, self.out_features, max_rank, dtype=wide)
        )
        padding = torch.arange(max_rank) >= torch.tensor(self.ranks)[:, None]  # (K, R)
        device = self.weight.device
        self.register_buffer("scaling", torch.tensor(scalings, dtype=wide, device=device))
        self.register_buffer("padding", padding.to(device))
        if bool(padding.any()):
            # The padding's gradient is a sum of products with zeros: zero already, except where
            # an activation is infinite.
            self.lora_A.register_hook(lambda grad: grad.masked_fill(self.padding[:, :, None], 0))
            self.lora_B.register_hook(lambda grad: grad.masked_fill(self.padding[:, None, :], 0))
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:  # (K·B, ..., I) or (K, B, ..., I) -> (..., O)
        return self.add_low_rank(F.linear(x, self.weight, self.bias), x)

    def add_low_rank(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the outputs `y` (..., O) with each adapter's low-rank part for `x` added."""
        own = self._dropout(self._by_adapter(x)).to(self.lora_A.dtype)  # (K, N, I)
        low = torch.bmm(own, self.lora_A.mT)  # (K, N, R)
        scaled = torch.bmm(low, self.lora_B.mT) * self.scaling[:, None, None]  # (K, N, O)
        return y + scaled.view_as(y).to(y.dtype)

    def unwrap(self) -> nn.Module:
        """Return the plain linear, with the same `weight` and `bias` tensors."""
        with torch.device("meta"):  # no storage: both parameters are replaced at once
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight, linear.bias = self.weight, self.bias  # type: ignore[assignment]
        return linear.train(self.training)

    @torch.no_grad()
    def fill(self, k: int, a: Tensor, b: Tensor) -> None:
        """Changes adapter `k` in place: A becomes `a` (R_k, I), B `b` (O, R_k), padding zero."""
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
                f"Cannot split a batch of {len(x)} among {n_adapters} stacked adapters: all need "
                "the same batch size. Concatenate the adapters' batches along the first dimension."
            )
        return x.reshape(n_adapters, -1, self.in_features)  # (K, N, I)

    def _dropout(self, x: Tensor) -> Tensor:  # (K, N, I) -> (K, N, I)
        if not self.training or not any(self.dropouts):
            return x
        # On the CPU and adapter by adapter, in the order in which nn.Dropout draws: each adapter
        # gets the mask that it would get alone.
        noise = torch.ones(x.shape, dtype=x.dtype)
        for k, (p, generator) in enumerate(zip(self.dropouts, self.stack.generators, strict=True)):
            if p:
                noise[k].bernoulli_(1 - p, generator=generator).div_(1 - p)
        return x * noise.to(x.device)


class FusedStackedLoRALinear(StackedLoRALinear):
    """StackedLoRALinear without dropout as one autograd function: fewer passes over memory, fewer
    saved activations.

    Agrees with it within 1e-5 in fp32, outputs and gradients (‖difference‖ / ‖reference‖).
    """

    def forward(self, x: Tensor) -> Tensor:  # (K·B, ..., I) -> (K·B, ..., O)
        tensors = self.weight, self.bias, self.lora_A, self.lora_B, self.scaling
        y = _StackedLoRALinear.apply(self._by_adapter(x), *tensors)  # (K, N, O)
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
        y = shaped_as(F.linear(x.flatten(0, 1), weight, bias), x)  # (K, N, O)
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
    """An embedding that each of K adapters trains its own copy of: `weight` is (K, V, C).

    Tokens (K·B, T) are looked up in their own adapter's table. Ids without a batch dimension, (T,),
    as of learned positions, give the same rows of each adapter's table to each of its B sequences,
    (K·B, T, C), with B from `stack.batch_size`.
    """

    def __init__(self, base: nn.Embedding, stack: Stack) -> None:
        super().__init__()
        # The base in a list is no submodule: its weight must not count as a parameter of this one.
        self.stack, self.base = stack, [base]
        repeated = base.weight.detach().expand(stack.n_adapters, -1, -1)  # (K, V, C)
        self.weight = nn.Parameter(repeated.clone())
        self.train(base.training)

    def forward(self, ids: Tensor) -> Tensor:  # (K·B, T) or (T,) -> (K·B, T, C)
        # Indexed by adapter and token, not by F.embedding over (K·V, C): the weight may be a view
        # into the optimizer's flat buffer, where its adapters are not contiguous.
        own = torch.arange(len(self.weight), device=ids.device)[:, None]  # (K, 1)
        if ids.ndim == 1:
            shared = self.weight[own, ids]  # (K, T, C)
            return shared.repeat_interleave(self._batch_size(), dim=0)  # (K·B, T, C)
        by_adapter = ids.unflatten(0, (len(own), -1))  # (K, B, T)
        return self.weight[own[:, :, None], by_adapter].flatten(0, 1)  # (K·B, T, C)

    def unwrap(self) -> nn.Embedding:
        """Return the embedding that was given."""
        return self.base[0]

    def _batch_size(self) -> int:
        if self.stack.batch_size < 1:
            raise ModelError(
                "Cannot read a stacked embedding by ids without a batch dimension: "
                "stack.batch_size is not set. Set it to the batch size of one adapter."
            )
        return self.stack.batch_size


def _check_lengths(stack: Stack, *lists: Sequence[float]) -> None:
    seen = [len(values) for values in lists]
    if not stack.n_adapters or seen != [stack.n_adapters] * len(lists):
        raise ConfigError(
            f"Cannot stack {stack.n_adapters} adapters with {seen[0]} ranks, {seen[1]} scalings "
            f"and {seen[2]} dropouts: each adapter needs one of each."
        )
