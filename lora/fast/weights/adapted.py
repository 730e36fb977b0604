"""Projections with LoRA: three ways to add B·A to W.

- `ConcatenatedLoRAProjection` holds LoRA's two matrices in the same tensor as W:
  [[W, s·B], [A, 0]]. Then y = [x, x Aᵀ] [W, s·B]ᵀ is one matmul, and so is
  dx = [dy, s·dy B] [W; A].
- `MergedProjection` adds s·B·A to W once a step, for all blocks in one matmul: no small matmul is
  left in the sequence of blocks. W' is rounded as the weights of mixed-precision training are.
- `SeparateLoRAProjection` computes LoRA in matmuls of its own: for dropout on its inputs, and for
  fp8 weights (`lora.fast.llama.fp8`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora.fast.weights.flat import FlatParameters, Slot
from lora.fast.weights.projections import Member, Projection
from lora.kernels.step.ops import Ops
from lora.lora_module import LoRALayer

RANK_STEP = 16
"""Columns for LoRA come in multiples of this, so that rows of every tensor stay aligned."""
GROUP_BYTES = 1.2e9
"""Weights of one projection that are moved at once."""


class DropoutMasks:
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

    def copy_adapters(self, a: Tensor, b: Tensor, layers: slice = slice(None)) -> None:
        """Changes `a` (L, R, I) and `b` (L, O, R) in place: the slots' A, and B · scaling.

        Of some `layers`, L counts those.
        """
        a.copy_(self.a_slot.values[layers])
        for member, part, slot, scale in self.adapted:
            torch.mul(slot.values[layers], scale[layers], out=b[:, member.rows, part])

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


class ConcatenatedLoRAProjection(_LoRAProjection):
    """LoRA's matrices in the same tensor as W: (O + R, I + R) a block.

    Blocks are moved in groups, so that the whole of a large base is never there twice.
    """

    def __init__(
        self, blocks: Sequence[Sequence[nn.Module]], flat: FlatParameters, dtype: torch.dtype
    ) -> None:
        super().__init__(blocks, flat, dtype)
        self.extra = self.width
        self.groups: list[tuple[slice, Tensor]] = []
        """Blocks, and their [[W, s·B], [A, 0]]: (some of L, O + R, I + R)."""
        self.wholes: list[Tensor] = []
        """The same by block, (O + R, I + R)."""
        a_block = (self.outputs + self.width) * (self.inputs + self.width) * dtype.itemsize
        at_once = max(1, int(GROUP_BYTES / a_block))
        for start in range(0, self.n_layers, at_once):
            layers = slice(start, min(start + at_once, self.n_layers))
            count = layers.stop - start
            whole = self.empty(count, self.outputs + self.width, self.inputs + self.width)
            whole[:, : self.outputs, self.inputs :] = 0
            whole[:, self.outputs :, self.inputs :] = 0
            self.groups.append((layers, whole))
            self.wholes += list(whole)
            self.move([w[: self.outputs, : self.inputs] for w in whole], layers)
        self._place_biases()

    def refresh(self) -> None:
        for layers, whole in self.groups:
            a = whole[:, self.outputs :, : self.inputs]  # (layers, R, I)
            b = whole[:, : self.outputs, self.inputs :]  # (layers, O, R), scaled
            self.copy_adapters(a, b, layers)

    def forward(self, layer: int, x: Tensor, out: Tensor) -> None:
        whole = self.wholes[layer]
        a = whole[self.outputs :, : self.inputs]  # (R, I)
        torch.mm(x[:, : self.inputs], a.T, out=x[:, self.inputs :])
        self.multiply(layer, x, whole[: self.outputs], out)  # by [W, s·B]

    def backward(self, layer: int, dy: Tensor, dx: Tensor | None) -> None:
        whole = self.wholes[layer]
        b = whole[: self.outputs, self.inputs :]  # (O, R), scaled
        torch.mm(dy[:, : self.outputs], b, out=dy[:, self.outputs :])
        if dx is not None:
            torch.mm(dy, whole[:, : self.inputs], out=dx)  # by [W; A]

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


class SeparateLoRAProjection(_LoRAProjection):
    """LoRA apart from W: y = x Wᵀ, then y += (x Aᵀ) (s·B)ᵀ.

    With `masks` its inputs pass dropout; linears that share inputs share the mask.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[nn.Module]],
        flat: FlatParameters,
        dtype: torch.dtype,
        ops: Ops,
        masks: DropoutMasks | None,
    ) -> None:
        super().__init__(blocks, flat, dtype)
        self.ops, self.masks = ops, masks
        self.number = 0 if masks is None else masks.take(len(blocks))
        self.extra = self.width
        self.a = self.empty(self.n_layers, self.width, self.inputs)
        self.b = self.empty(self.n_layers, self.outputs, self.width).zero_()
        self.place_base()

    def place_base(self) -> None:
        """Take the base's weights over."""
        self.base = self.empty(self.n_layers, self.outputs, self.inputs)
        self.place(self.base)

    def base_forward(self, layer: int, x: Tensor, out: Tensor) -> None:
        """Changes `out` (N, O) in place: x Wᵀ and the bias, for x (N, I)."""
        self.multiply(layer, x, self.base[layer], out)

    def base_backward(self, layer: int, dy: Tensor, dx: Tensor) -> None:
        """Changes `dx` (N, I) in place: dy W, for dy (N, O)."""
        torch.mm(dy, self.base[layer], out=dx)

    def refresh(self) -> None:
        self.copy_adapters(self.a, self.b)

    def _dropped(self, layer: int, x: Tensor) -> Tensor:
        """Return LoRA's inputs (N, I): made again where they are needed again."""
        if self.masks is None:
            return x
        out = torch.empty_like(x)
        self.ops.drop(x, out, self.masks.seed, self.number + layer, self.masks.share)
        return out

    def forward(self, layer: int, x: Tensor, out: Tensor) -> None:
        plain, h = x[:, : self.inputs], x[:, self.inputs :]
        torch.mm(self._dropped(layer, plain), self.a[layer].T, out=h)
        self.base_forward(layer, plain, out)
        out.addmm_(h, self.b[layer].T)

    def backward(self, layer: int, dy: Tensor, dx: Tensor | None) -> None:
        dy, dh = dy[:, : self.outputs], dy[:, self.outputs :]
        torch.mm(dy, self.b[layer], out=dh)
        if dx is None:
            return
        self.base_backward(layer, dy, dx)
        if self.masks is None:
            dx.addmm_(dh, self.a[layer])
            return
        low = dh @ self.a[layer]  # (N, I)
        self.ops.add_dropped(low, dx, self.masks.seed, self.number + layer, self.masks.share)

    def receive(self, layers: slice, x: Tensor, dy: Tensor, *, first: bool) -> None:
        if self.masks is None:
            h, dh = x[..., self.inputs :], dy[..., self.outputs :]
            self.put(layers, x[..., : self.inputs], dy[..., : self.outputs], h, dh, first=first)
            return
        for place, layer in enumerate(range(self.n_layers)[layers]):
            dropped = self._dropped(layer, x[place, :, : self.inputs])  # (N, I)
            h, dh = x[place, :, self.inputs :], dy[place, :, self.outputs :]
            d_outputs = dy[place, :, : self.outputs]
            one = slice(layer, layer + 1)
            self.put(one, dropped[None], d_outputs[None], h[None], dh[None], first=first)


def _move(parameter: Tensor, view: Tensor) -> None:
    view.copy_(parameter)
    parameter.data = view
