"""Projections with LoRA: three ways to put B·A beside W.

- `SplitProjection` keeps LoRA's two matrices in the same tensor as W, [[W, s·B], [A, 0]]:
  y = [x, x Aᵀ] [W, s·B]ᵀ and dx = [dy, s·dy B] [W; A] are one product each.
- `MergedProjection` adds s·B·A to W once a step, for all blocks in one product: nothing small is
  left in the sequence of blocks. W' is rounded as the weights of mixed-precision training are.
- `DroppedProjection` keeps LoRA apart, with dropout on its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora.fast.flat import FlatParameters, Slot
from lora.fast.ops import Ops
from lora.fast.projections import Member, Projection
from lora.lora_module import LoRALayer

RANK_STEP = 16
"""Columns for LoRA come in multiples of this, so that rows of every tensor stay aligned."""


class Masks:
    """Dropout's share, its seed on the device, and a number for every mask of a step."""

    def __init__(self, share: float, device: torch.device) -> None:
        self.share, self._next = share, 0
        self.seed = torch.zeros((), dtype=torch.int64, device=device)

    def take(self, count: int) -> int:
        """Return the first of `count` numbers that nobody else has."""
        first, self._next = self._next, self._next + count
        return first


class _LoRAProjection(Projection):
    """What both kinds with LoRA share: slots for A and B, their layout, their gradients."""

    def __init__(
        self, blocks: Sequence[Sequence[nn.Module]], flat: FlatParameters, dtype: torch.dtype
    ) -> None:
        super().__init__(blocks, dtype)
        self.adapted: list[tuple[Member, slice, Slot, Tensor]] = []
        start = 0
        for member in self.members:
            ranks = [m.rank for m in member.modules if isinstance(m, LoRALayer)]
            if ranks:
                part = slice(start, start + max(ranks))
                height = member.rows.stop - member.rows.start
                slot = flat.reserve((self.n_layers, height, max(ranks)), decays=True)
                scales = [m.scaling if isinstance(m, LoRALayer) else 0.0 for m in member.modules]
                scale = torch.tensor(scales, dtype=flat.dtype, device=self.device)[:, None, None]
                self.adapted.append((member, part, slot, scale))
                start = part.stop
        self.width = self.rounded(start)
        """Columns of h, all members' ranks together, rounded up."""
        self.a_slot = flat.reserve((self.n_layers, self.width, self.inputs), decays=True)

    def rounded(self, ranks: int) -> int:
        """Return `ranks` rounded up, so that rows of every tensor stay aligned."""
        return -(-ranks // RANK_STEP) * RANK_STEP

    def fill(self) -> None:
        for member, part, slot, _ in self.adapted:
            for layer, module in enumerate(member.modules):
                if isinstance(module, LoRALayer):
                    rows = slice(part.start, part.start + module.rank)
                    _move(module.lora_A, self.a_slot.values[layer, rows])
                    _move(module.lora_B, slot.values[layer, :, : module.rank])
        self.refresh()

    def copy_adapters(self, a: Tensor, b: Tensor) -> None:
        """Changes `a` (L, R, I) and `b` (L, O, R) in place: the slots' A, and B · scaling."""
        a.copy_(self.a_slot.values)
        for member, part, slot, scale in self.adapted:
            torch.mul(slot.values, scale, out=b[:, member.rows, part])

    def put(
        self, layers: slice, x: Tensor, dy: Tensor, h: Tensor, dh: Tensor, *, first: bool
    ) -> None:
        """Put dA = dhᵀ x and dB = s · dyᵀ h into their slots; all are (layers, N, …)."""
        self.store(layers, torch.bmm(dh.mT, x), torch.bmm(dy.mT, h), first=first)

    def store(self, layers: slice, da: Tensor, db: Tensor, *, first: bool) -> None:
        """Put dA (layers, R, I) and s · dB into their slots; dB (layers, O, R) is without s."""
        target = self.a_slot.gradients[layers]
        target.copy_(da) if first else target.add_(da)
        for member, part, slot, scale in self.adapted:
            block = db[:, member.rows, part]
            target = slot.gradients[layers]
            if first:
                torch.mul(block, scale[layers], out=target)
            else:
                target.add_(block * scale[layers])


class SplitProjection(_LoRAProjection):
    """LoRA's matrices in the same tensor as W: (L, O + R, I + R)."""

    def __init__(
        self, blocks: Sequence[Sequence[nn.Module]], flat: FlatParameters, dtype: torch.dtype
    ) -> None:
        super().__init__(blocks, flat, dtype)
        self.extra = self.width
        whole = self.empty(self.n_layers, self.outputs + self.width, self.inputs + self.width)
        whole[:, self.outputs :, self.inputs :] = 0
        self.rows = whole[:, : self.outputs]  # (L, O, I + R): [W, s·B]
        self.columns = whole[:, :, : self.inputs]  # (L, O + R, I): [W; A]
        self.a = whole[:, self.outputs :, : self.inputs]  # (L, R, I)
        self.b = whole[:, : self.outputs, self.inputs :]  # (L, O, R), scaled
        self.b.zero_()
        self.place(whole[:, : self.outputs, : self.inputs])

    def refresh(self) -> None:
        self.copy_adapters(self.a, self.b)

    def forward(self, layer: int, x: Tensor, out: Tensor) -> None:
        torch.mm(x[:, : self.inputs], self.a[layer].T, out=x[:, self.inputs :])
        self.multiply(layer, x, self.rows[layer], out)

    def backward(self, layer: int, dy: Tensor, dx: Tensor | None) -> None:
        torch.mm(dy[:, : self.outputs], self.b[layer], out=dy[:, self.outputs :])
        if dx is not None:
            torch.mm(dy, self.columns[layer], out=dx)

    def receive(self, layers: slice, x: Tensor, dy: Tensor, *, first: bool) -> None:
        x, h = x[..., : self.inputs], x[..., self.inputs :]
        dy, dh = dy[..., : self.outputs], dy[..., self.outputs :]
        self.put(layers, x, dy, h, dh, first=first)


class MergedProjection(_LoRAProjection):
    """W + s·B·A, made once a step for all blocks."""

    def __init__(
        self,
        blocks: Sequence[Sequence[nn.Module]],
        flat: FlatParameters,
        dtype: torch.dtype,
        ops: Ops,
    ) -> None:
        super().__init__(blocks, flat, dtype)
        self.ops = ops
        self.base = self.empty(self.n_layers, self.outputs, self.inputs)
        self.weight = torch.empty_like(self.base)
        self.a = self.empty(self.n_layers, self.width, self.inputs)
        self.b = self.empty(self.n_layers, self.outputs, self.width).zero_()
        self.place(self.base)

    def rounded(self, ranks: int) -> int:
        return max(RANK_STEP, 1 << (ranks - 1).bit_length())  # the kernel wants a power of two

    def refresh(self) -> None:
        self.copy_adapters(self.a, self.b)
        self.ops.add_low_rank(self.base, self.b, self.a, self.weight)

    def forward(self, layer: int, x: Tensor, out: Tensor) -> None:
        self.multiply(layer, x, self.weight[layer], out)

    def backward(self, layer: int, dy: Tensor, dx: Tensor | None) -> None:
        if dx is not None:
            torch.mm(dy, self.weight[layer], out=dx)

    def receive(self, layers: slice, x: Tensor, dy: Tensor, *, first: bool) -> None:
        h = torch.bmm(x, self.a[layers].mT)  # (layers, N, R)
        dh = torch.bmm(dy, self.b[layers])  # (layers, N, R)
        self.put(layers, x, dy, h, dh, first=first)


class DroppedProjection(_LoRAProjection):
    """LoRA apart from W, with dropout on its inputs; linears that share inputs share the mask."""

    def __init__(
        self,
        blocks: Sequence[Sequence[nn.Module]],
        flat: FlatParameters,
        dtype: torch.dtype,
        ops: Ops,
        masks: Masks,
    ) -> None:
        super().__init__(blocks, flat, dtype)
        self.ops, self.masks, self.number = ops, masks, masks.take(len(blocks))
        self.extra = self.width
        self.base = self.empty(self.n_layers, self.outputs, self.inputs)
        self.a = self.empty(self.n_layers, self.width, self.inputs)
        self.b = self.empty(self.n_layers, self.outputs, self.width).zero_()
        self.place(self.base)

    def refresh(self) -> None:
        self.copy_adapters(self.a, self.b)

    def _dropped(self, layer: int, x: Tensor) -> Tensor:
        """Return LoRA's inputs (N, I): made again where they are needed again."""
        out = torch.empty_like(x)
        self.ops.drop(x, out, self.masks.seed, self.number + layer, self.masks.share)
        return out

    def forward(self, layer: int, x: Tensor, out: Tensor) -> None:
        plain, h = x[:, : self.inputs], x[:, self.inputs :]
        torch.mm(self._dropped(layer, plain), self.a[layer].T, out=h)
        self.multiply(layer, plain, self.base[layer], out)
        out.addmm_(h, self.b[layer].T)

    def backward(self, layer: int, dy: Tensor, dx: Tensor | None) -> None:
        dy, dh = dy[:, : self.outputs], dy[:, self.outputs :]
        torch.mm(dy, self.b[layer], out=dh)
        if dx is not None:
            torch.mm(dy, self.base[layer], out=dx)
            low = dh @ self.a[layer]  # (N, I)
            place = self.number + layer
            self.ops.add_dropped(low, dx, self.masks.seed, place, self.masks.share)

    def receive(self, layers: slice, x: Tensor, dy: Tensor, *, first: bool) -> None:
        for place, layer in enumerate(range(self.n_layers)[layers]):
            dropped = self._dropped(layer, x[place, :, : self.inputs])  # (N, I)
            h, dh = x[place, :, self.inputs :], dy[place, :, self.outputs :]
            d_outputs = dy[place, :, : self.outputs]
            one = slice(layer, layer + 1)
            self.put(one, dropped[None], d_outputs[None], h[None], dh[None], first=first)


def _move(parameter: Tensor, view: Tensor) -> None:
    view.copy_(parameter)
    parameter.data = view
