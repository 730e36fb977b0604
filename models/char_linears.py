"""Linears that read the same input, in all blocks, for the hand-written step on a CPU.

What differs from `lora.fast.weights.projections`: results are new tensors, because the faster
library for large matmuls (`lora.kernels.matmul`) allocates them; and the gradients of small weights
are computed after the backward pass, those of all blocks in one batched matmul each: the cost of a
small matmul is its call, and its two threads waiting for each other. LoRA's gradients are computed
the cheaper way for the layer's size: by matmuls with A and B or, where the rank is high against the
weight, from dW, which is accumulated as in full fine-tuning and multiplied by A and B once a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora.fast.weights.adapted import MergedProjection
from lora.fast.weights.flat import FlatParameters, Slot
from lora.fast.weights.projections import FrozenProjection, FullProjection, Member
from lora.kernels.matmul import matmul_nt, matmul_tn
from lora.kernels.step.ops import PLAIN
from lora.lora_module import LoRALayer

SMALL_WEIGHT = 2**15
"""Elements up to which gradients are deferred to the end of the pass, and batched."""
NARROW_COST = 3.5
"""How much more a multiplication costs in matmuls with A and B than in the one of dW."""
SMALL_NARROW_COST = 1.5
"""The same in batched matmuls of small weights."""
MIN_RANK = 16
"""A matmul of a lower rank takes no less time."""


class MergedLinears(MergedProjection):
    """W + s·B·A, merged once a step for all blocks."""

    def __init__(
        self, blocks: Sequence[Sequence[nn.Module]], flat: FlatParameters, dtype: torch.dtype
    ) -> None:
        super().__init__(blocks, flat, dtype, PLAIN)
        n_in, n_out = self.inputs, self.outputs
        is_small = n_in * n_out <= SMALL_WEIGHT
        cost = SMALL_NARROW_COST if is_small else NARROW_COST
        uses_dw = n_in * n_out <= cost * max(self.width, MIN_RANK) * (n_in + n_out)
        self.dw = torch.empty_like(self.base) if uses_dw else None  # dW, (L, O, I)
        self.defers = is_small
        """Whether gradients of all blocks are computed together, after the backward pass."""

    def fill(self) -> None:
        # Views of the slots, made once: at small sizes making them is a good part of a step. In
        # fp32 the slot's A serves matmuls as it is.
        self.a, self.da = self.a_slot.values, self.a_slot.gradients  # (L, R, I)
        self.bt = self.b.mT  # (L, R, O)
        self.adapters = [_MemberLoRA(self, *adapted) for adapted in self.adapted]
        super().fill()
        self.by_layer = list(zip(self.a, self.bt, strict=True))  # (R, I), (R, O)

    def refresh(self) -> None:
        for adapter in self.adapters:
            torch.mul(adapter.slot.values, adapter.scale, out=adapter.b)
        torch.baddbmm(self.base, self.b, self.a, out=self.weight)

    def rounded_rank(self, ranks: int) -> int:
        return ranks

    def accumulate_gradients(self, layers: slice, x: Tensor, dy: Tensor, *, first: bool) -> None:
        """Add the gradients from x (layers, N, I) and dy (layers, N, O); if deferred, of all."""
        beta = 0 if first else 1
        if self.dw is not None:
            dw = self.dw[layers]  # (layers, O, I)
            torch.baddbmm(dw, dy.mT, x, beta=beta, out=dw)
        elif self.defers:
            self._accumulate_deferred(x, beta)
        else:
            for layer, one_x, one_dy in zip(range(self.n_layers)[layers], x, dy, strict=True):
                self._accumulate_one(layer, one_x, one_dy, first=first)

    def allocate(self, x: Tensor, dy: Tensor) -> None:
        """Make views and scratch for passes that leave x (L, N, I) and dy (L, N, O) there."""
        self.x_t = x.mT
        self.low = self.empty(self.n_layers, self.width, x.shape[1])  # (L, R, N), A xᵀ
        for adapter in self.adapters:
            adapter.allocate(self.low, dy)
        self.dlow = torch.empty_like(self.low)

    def _accumulate_deferred(self, x: Tensor, beta: int) -> None:
        # (R, N), not (N, R): with the rank first a matmul takes half the time or less.
        torch.bmm(self.a, self.x_t, out=self.low)  # (L, R, N)
        for adapter in self.adapters:
            torch.bmm(adapter.bt, adapter.dy_t, out=adapter.dlow)
            torch.baddbmm(adapter.db_t, adapter.low, adapter.dy, beta=beta, out=adapter.db_t)
        if len(self.adapters) > 1:
            torch.cat([adapter.dlow for adapter in self.adapters], 1, out=self.dlow)
        dlow = self.dlow if len(self.adapters) > 1 else self.adapters[0].dlow
        torch.baddbmm(self.da, dlow, x, beta=beta, out=self.da)

    def _accumulate_one(self, layer: int, x: Tensor, dy: Tensor, *, first: bool) -> None:
        a, b = self.by_layer[layer]
        low, dlow = matmul_nt(x, a), matmul_nt(dy, b)  # (N, R)
        da = matmul_tn(dlow, x)  # (R, I)
        db = matmul_tn(low, dy).T  # (O, R); dyᵀ low is several times slower
        self.accumulate_ab(slice(layer, layer + 1), da[None], db[None], first=first)

    def finish(self) -> None:
        """After a step's last micro-batch: put into the slots what is not yet there."""
        if self.dw is None and not self.defers:
            return
        for adapter in self.adapters:
            if self.dw is None:
                db = adapter.db_t.mT
            else:
                adapter.da.copy_(torch.bmm(adapter.bt, adapter.dw))  # (L, R, I)
                db = torch.bmm(adapter.dw, adapter.a_t)  # (L, O, R)
            torch.mul(db, adapter.scale, out=adapter.slot.gradients)


class _MemberLoRA:
    """The LoRA of one member, and the views of it that a step needs."""

    def __init__(
        self, whole: MergedLinears, member: Member, ranks: slice, slot: Slot, scale: Tensor
    ) -> None:
        self.outputs, self.ranks, self.slot, self.scale = member.rows, ranks, slot, scale
        self.b = whole.b[:, member.rows, ranks]  # s·B, (L, O, R) of the member
        self.bt = self.b.mT
        self.a_t, self.da = whole.a[:, ranks].mT, whole.da[:, ranks]
        if whole.dw is not None:
            self.dw = whole.dw[:, member.rows]
        self.db_t = whole.empty(*self.bt.shape)  # dB without s, transposed, (L, R, O)

    def allocate(self, low: Tensor, dy: Tensor) -> None:
        """Make the views of A xᵀ (L, R, N) and dy (L, N, O) that are this member's."""
        self.dy = dy[..., self.outputs]
        self.dy_t = self.dy.mT
        self.low = low[:, self.ranks]
        self.dlow = low.new_empty(self.low.shape)


class FullLinears(FullProjection):
    """The linears train in full."""

    def __init__(
        self, blocks: Sequence[Sequence[nn.Module]], flat: FlatParameters, dtype: torch.dtype
    ) -> None:
        super().__init__(blocks, flat, dtype)
        self.defers = self.inputs * self.outputs <= SMALL_WEIGHT

    def accumulate_gradients(self, layers: slice, x: Tensor, dy: Tensor, *, first: bool) -> None:
        beta = 0 if first else 1
        target = self.slot.gradients[layers]  # (layers, O, I)
        torch.baddbmm(target, dy.mT, x, beta=beta, out=target)
        if self.bias_slot is not None:
            target = self.bias_slot.gradients[layers]  # (layers, O)
            torch.sum(dy, 1, out=target) if first else target.add_(dy.sum(1))


class FrozenLinears(FrozenProjection):
    """The linears are frozen."""

    defers = False


class FusedLinears:
    """Linears that read the same input, as one matmul in each block.

    Args:
        blocks: the linears, by block; with LoRA if any of them has it, else frozen.
        flat: where what trains gets its slots.
        dtype: compute dtype.
        trains_all_weights: all their weights train.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[nn.Module]],
        flat: FlatParameters,
        dtype: torch.dtype,
        *,
        trains_all_weights: bool,
    ) -> None:
        self.projection: MergedLinears | FullLinears | FrozenLinears
        if trains_all_weights:
            self.projection = FullLinears(blocks, flat, dtype)
        elif any(isinstance(module, LoRALayer) for block in blocks for module in block):
            self.projection = MergedLinears(blocks, flat, dtype)
        else:
            self.projection = FrozenLinears(blocks, dtype)
        self.inputs: list[Tensor | None] = [None] * len(blocks)
        """By block, the buffer for its input (N, I); None: it may lie anywhere."""
        self.gradients: list[Tensor | None] = [None] * len(blocks)
        """By block, the buffer for the gradient (N, O) of its output."""
        self.outputs: list[Tensor | None] = [None] * len(blocks)
        self.d_input: Tensor | None = None
        self._n_tokens = -1

    def fill(self) -> None:
        """Put the parameters' values into their slots, once these are allocated."""
        projection = self.projection
        projection.fill()
        # Views of one block each, made once: at small sizes making them is a good part of a step.
        self.weights = list(
            projection.weights if isinstance(projection, FrozenLinears) else projection.weight
        )
        self.transposed = [weight.T for weight in self.weights]
        self.biases = (
            [None] * projection.n_layers if projection.bias is None else list(projection.bias)
        )

    def refresh(self) -> None:
        """Bring the weights that matmuls read up to date."""
        self.projection.refresh()

    def allocate(self, n_tokens: int) -> None:
        """Allocate buffers for inputs and gradients of `n_tokens` = N tokens."""
        projection = self.projection
        if not projection.defers or n_tokens == self._n_tokens:
            return
        self._n_tokens = n_tokens
        self.x = projection.empty(projection.n_layers, n_tokens, projection.inputs)
        self.dy = projection.empty(projection.n_layers, n_tokens, projection.outputs)
        self.inputs, self.gradients = list(self.x), list(self.dy)
        # The same memory every time is in the cache more often than what is new.
        self.outputs = list(projection.empty(projection.n_layers, n_tokens, projection.outputs))
        self.d_input = projection.empty(n_tokens, projection.inputs)
        if isinstance(projection, MergedLinears):
            projection.allocate(self.x, self.dy)

    def forward(self, layer: int, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return y (N, O) of x (N, I), in `out` if that is given; y lasts until the next pass."""
        _copy_unless_there(x, self.inputs[layer])
        out = self.outputs[layer] if out is None else out
        bias = self.biases[layer]
        if out is None:
            return matmul_nt(x, self.weights[layer], bias)
        if bias is None:
            return torch.mm(x, self.transposed[layer], out=out)
        return torch.addmm(bias, x, self.transposed[layer], out=out)

    def backward(
        self, layer: int, x: Tensor, dy: Tensor, *, first: bool, out: Tensor | None = None
    ) -> Tensor:
        """Return dx (N, I), in `out` if that is given; it lasts until the next block's.

        Weight gradients are added up, or written if `first`; those that are deferred only by
        `accumulate_gradients`.
        """
        _copy_unless_there(dy, self.gradients[layer])
        if not self.projection.defers:
            self.projection.accumulate_gradients(
                slice(layer, layer + 1), x[None], dy[None], first=first
            )
        out = self.d_input if out is None else out
        if out is None:
            return matmul_nt(dy, self.transposed[layer])
        return torch.mm(dy, self.weights[layer], out=out)

    def accumulate_gradients(self, *, first: bool) -> None:
        """Add the gradients that were deferred to the end of a pass."""
        if self.projection.defers:
            self.projection.accumulate_gradients(slice(None), self.x, self.dy, first=first)

    def finish(self) -> None:
        """Complete the gradients, after the step's last micro-batch."""
        if isinstance(self.projection, MergedLinears):
            self.projection.finish()


def _copy_unless_there(tensor: Tensor, buffer: Tensor | None) -> None:
    # Callers that can, write into the buffer themselves.
    if buffer is not None and tensor.data_ptr() != buffer.data_ptr():
        buffer.copy_(tensor)
