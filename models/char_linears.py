"""The linears of one place in all blocks, for steps by hand on a CPU.

What differs from `lora.fast.weights.projections`: results are new tensors, because the faster
library for large products (`lora.kernels.matmul`) makes them; and the gradients of small weights
are made at the end of a pass, those of all blocks in one batched product each: what such a product
costs is its call, and its two threads waiting for each other. LoRA's come the cheaper way for the
layer's size: from products with A and B or, where these are wide against the weight, from dW, which
is then formed as full fine-tuning forms it and met with A and B once a step."""

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
"""Elements up to which gradients wait for the end of the pass, and are batched."""
NARROW_COST = 3.5
"""How much dearer a multiplication is in products with A and B than in one that forms dW."""
SMALL_NARROW_COST = 1.5
"""The same in batched products of small weights."""
MIN_RANK = 16
"""Lower ranks take no less time."""


class MergedLinears(MergedProjection):
    """W + s·B·A, made once a step for all blocks."""

    def __init__(
        self, blocks: Sequence[Sequence[nn.Module]], flat: FlatParameters, dtype: torch.dtype
    ) -> None:
        super().__init__(blocks, flat, dtype, PLAIN)
        n_in, n_out = self.inputs, self.outputs
        is_small = n_in * n_out <= SMALL_WEIGHT
        cost = SMALL_NARROW_COST if is_small else NARROW_COST
        forms = n_in * n_out <= cost * max(self.width, MIN_RANK) * (n_in + n_out)
        self.formed = torch.empty_like(self.base) if forms else None  # dW, (L, O, I)
        self.waits = is_small
        """Whether gradients are made for all blocks together."""

    def fill(self) -> None:
        # Views of the slots, made once: at small sizes making them is a good part of a step.
        self.a, self.da = self.a_slot.values, self.a_slot.gradients  # (L, R, I)
        self.bt = self.b.mT  # (L, R, O)
        self.parts = [_Part(self, *adapted) for adapted in self.adapted]
        super().fill()
        self.by_layer = list(zip(self.a, self.bt, strict=True))  # (R, I), (R, O)

    def refresh(self) -> None:
        for part in self.parts:
            torch.mul(part.slot.values, part.scale, out=part.b)
        torch.baddbmm(self.base, self.b, self.a, out=self.weight)

    def rounded_rank(self, ranks: int) -> int:
        return ranks

    def accumulate_gradients(self, layers: slice, x: Tensor, dy: Tensor, *, first: bool) -> None:
        """Take in x (layers, N, I) and dy (layers, N, O); all layers, if they wait."""
        beta = 0 if first else 1
        if self.formed is not None:
            into = self.formed[layers]  # (layers, O, I)
            torch.baddbmm(into, dy.mT, x, beta=beta, out=into)
        elif self.waits:
            self._receive_small(x, beta)
        else:
            for layer, one_x, one_dy in zip(range(self.n_layers)[layers], x, dy, strict=True):
                self._receive_one(layer, one_x, one_dy, first=first)

    def make_room(self, x: Tensor, dy: Tensor) -> None:
        """Prepare for passes that leave x (L, N, I) and dy (L, N, O) of all blocks there."""
        self.x_turned = x.mT
        self.low = self.empty(self.n_layers, self.width, x.shape[1])  # (L, R, N), A xᵀ
        for part in self.parts:
            part.make_room(self.low, dy)
        self.dlow = torch.empty_like(self.low)

    def _receive_small(self, x: Tensor, beta: int) -> None:
        # Rank first: products that make (N, R) take several times longer.
        torch.bmm(self.a, self.x_turned, out=self.low)
        for part in self.parts:
            torch.bmm(part.bt, part.dy_turned, out=part.dlow)
            torch.baddbmm(part.turned, part.low, part.dy, beta=beta, out=part.turned)
        if len(self.parts) > 1:
            torch.cat([part.dlow for part in self.parts], 1, out=self.dlow)
        dlow = self.dlow if len(self.parts) > 1 else self.parts[0].dlow
        torch.baddbmm(self.da, dlow, x, beta=beta, out=self.da)

    def _receive_one(self, layer: int, x: Tensor, dy: Tensor, *, first: bool) -> None:
        a, b = self.by_layer[layer]
        low, dlow = matmul_nt(x, a), matmul_nt(dy, b)  # (N, R)
        da = matmul_tn(dlow, x)  # (R, I)
        db = matmul_tn(low, dy).T  # (O, R); dyᵀ low is several times slower
        self.accumulate_ab(slice(layer, layer + 1), da[None], db[None], first=first)

    def finish(self) -> None:
        """Put into their slots what is not yet there, after a step's last micro-batch."""
        if self.formed is None and not self.waits:
            return
        for part in self.parts:
            if self.formed is None:
                db = part.turned.mT
            else:
                part.da.copy_(torch.bmm(part.bt, part.formed))  # (L, R, I)
                db = torch.bmm(part.formed, part.a_turned)  # (L, O, R)
            torch.mul(db, part.scale, out=part.slot.gradients)


class _Part:
    """One member's LoRA, and the views of it that steps need."""

    def __init__(
        self, whole: MergedLinears, member: Member, ranks: slice, slot: Slot, scale: Tensor
    ) -> None:
        self.outputs, self.ranks, self.slot, self.scale = member.rows, ranks, slot, scale
        self.b = whole.b[:, member.rows, ranks]  # s·B, (L, O, R) of the member
        self.bt = self.b.mT
        self.a_turned, self.da = whole.a[:, ranks].mT, whole.da[:, ranks]
        if whole.formed is not None:
            self.formed = whole.formed[:, member.rows]
        self.turned = whole.empty(*self.bt.shape)  # dB without s, turned

    def make_room(self, low: Tensor, dy: Tensor) -> None:
        """Make the views of A xᵀ (L, R, N) and dy (L, N, O) that are this member's."""
        self.dy = dy[..., self.outputs]
        self.dy_turned = self.dy.mT
        self.low = low[:, self.ranks]
        self.dlow = low.new_empty(self.low.shape)


class FullLinears(FullProjection):
    """All of the linears trains."""

    def __init__(
        self, blocks: Sequence[Sequence[nn.Module]], flat: FlatParameters, dtype: torch.dtype
    ) -> None:
        super().__init__(blocks, flat, dtype)
        self.waits = self.inputs * self.outputs <= SMALL_WEIGHT

    def accumulate_gradients(self, layers: slice, x: Tensor, dy: Tensor, *, first: bool) -> None:
        beta = 0 if first else 1
        target = self.slot.gradients[layers]  # (layers, O, I)
        torch.baddbmm(target, dy.mT, x, beta=beta, out=target)
        if self.bias_slot is not None:
            target = self.bias_slot.gradients[layers]  # (layers, O)
            torch.sum(dy, 1, out=target) if first else target.add_(dy.sum(1))


class FrozenLinears(FrozenProjection):
    """None of the linears trains."""

    waits = False


class Linears:
    """Linears that read the same input, as one product, by block.

    Args:
        blocks: the linears, by block; with LoRA if any of them has it, else frozen.
        flat: where what trains gets its slots.
        dtype: of the products.
        trains_whole: all their weights train.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[nn.Module]],
        flat: FlatParameters,
        dtype: torch.dtype,
        *,
        trains_all_weights: bool,
    ) -> None:
        self.kind: MergedLinears | FullLinears | FrozenLinears
        if trains_all_weights:
            self.kind = FullLinears(blocks, flat, dtype)
        elif any(isinstance(module, LoRALayer) for block in blocks for module in block):
            self.kind = MergedLinears(blocks, flat, dtype)
        else:
            self.kind = FrozenLinears(blocks, dtype)
        self.inputs: list[Tensor | None] = [None] * len(blocks)
        """By block, where its input (N, I) is best put; None: anywhere."""
        self.gradients: list[Tensor | None] = [None] * len(blocks)
        """By block, where the gradient (N, O) of its output is best put."""
        self.outputs: list[Tensor | None] = [None] * len(blocks)
        self.d_input: Tensor | None = None
        self._rows = -1

    def fill(self) -> None:
        """Put the parameters' values into their slots, once these are allocated."""
        kind = self.kind
        kind.fill()
        # Views of one block each, made once: at small sizes making them is a good part of a step.
        self.weights = list(kind.weights if isinstance(kind, FrozenLinears) else kind.weight)
        self.transposed = [weight.T for weight in self.weights]
        self.biases = [None] * kind.n_layers if kind.bias is None else list(kind.bias)

    def refresh(self) -> None:
        """Bring the weights that products read up to date."""
        self.kind.refresh()

    def make_room(self, n_rows: int) -> None:
        """Make the places for inputs and gradients of `n_rows` = N tokens."""
        kind = self.kind
        if not kind.waits or n_rows == self._rows:
            return
        self._rows = n_rows
        self.x = kind.empty(kind.n_layers, n_rows, kind.inputs)
        self.dy = kind.empty(kind.n_layers, n_rows, kind.outputs)
        self.inputs, self.gradients = list(self.x), list(self.dy)
        # The same memory every time is in the cache more often than what is new.
        self.outputs = list(kind.empty(kind.n_layers, n_rows, kind.outputs))
        self.d_input = kind.empty(n_rows, kind.inputs)
        if isinstance(kind, MergedLinears):
            kind.make_room(self.x, self.dy)

    def forward(self, layer: int, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return y (N, O) of x (N, I), in `out` if that is given; y lasts until the next pass."""
        _put(x, self.inputs[layer])
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

        The gradients of what trains are added up, or begun if `first`; those that wait are so
        only after `accumulate_gradients`.
        """
        _put(dy, self.gradients[layer])
        if not self.kind.waits:
            self.kind.accumulate_gradients(slice(layer, layer + 1), x[None], dy[None], first=first)
        out = self.d_input if out is None else out
        if out is None:
            return matmul_nt(dy, self.transposed[layer])
        return torch.mm(dy, self.weights[layer], out=out)

    def accumulate_gradients(self, *, first: bool) -> None:
        """Make the gradients that wait for the end of a pass."""
        if self.kind.waits:
            self.kind.accumulate_gradients(slice(None), self.x, self.dy, first=first)

    def finish(self) -> None:
        """Complete the gradients, after the step's last micro-batch."""
        if isinstance(self.kind, MergedLinears):
            self.kind.finish()


def _put(tensor: Tensor, place: Tensor | None) -> None:
    if place is not None and tensor.data_ptr() != place.data_ptr():
        place.copy_(tensor)
