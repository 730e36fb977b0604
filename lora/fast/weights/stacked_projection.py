"""Projections with the LoRA of K adapters: two ways to put B_k·A_k beside W.

- `StackedProjection`: one product of all rows with W, small ones by adapter.
- `MergedStackedProjection` adds s_k·B_k·A_k to W once a step, for all adapters and blocks at once:
  K weights, and nothing small is left in the sequence of blocks.

What differs from `lora.fast.weights.adapted`: the rows of the buffers are those of adapter 0, then
those of adapter 1, and so on, and the A of linears that read the same input are one matrix (K, R,
I) for each block. A row of a product depends on that row alone, and the low-rank part of an adapter
on its own rows, so a NaN in one adapter's rows goes nowhere else. Smaller ranks are padded with
zero rows of A and columns of B; as both factors are zero there, the gradients of padding are zero
too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora.fast.weights.flat import Slot
from lora.fast.weights.projections import Member, Projection
from lora.fast.weights.stacked_flat import StackedFlat
from lora.kernels.step.ops import Ops
from lora.stacked.layers import StackedLoRALinear

RANK_STEP = 16
"""Columns for LoRA come in multiples of this, so that rows of every tensor stay aligned."""
MAX_GRADIENT_SCRATCH_ELEMENTS = 2**25
"""Gradients of A and B that are there twice, in the products' type beside the flat buffer."""


class StackedProjection(Projection):
    """y = x Wᵀ + (x A_kᵀ) (s_k B_k)ᵀ for the rows of each adapter k.

    `x` (K·N, I + R) keeps x Aᵀ in its last columns, `dy` (K·N, O + R) keeps s · dy B.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[nn.Module]],
        flat: StackedFlat,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(blocks, dtype)
        self.n_adapters = flat.n_adapters
        self.adapted: list[tuple[Member, slice, Slot, Tensor]] = []
        start = 0
        for member in self.members:
            ranks = [m.lora_A.shape[1] for m in member.modules if isinstance(m, StackedLoRALinear)]
            if ranks:
                part = slice(start, start + max(ranks))
                height = member.rows.stop - member.rows.start
                slot = flat.reserve((self.n_layers, height, max(ranks)), decays=True)
                self.adapted.append((member, part, slot, self._scales(member)))
                start = part.stop
        self.width = self.extra = self.rounded(start)
        """Columns of h, all members' ranks together, rounded up."""
        self.a_slot = flat.reserve((self.n_layers, self.width, self.inputs), decays=True)
        placed = None if self.device.type == "meta" else self.placed()
        self.base = (
            self.empty(self.n_layers, self.outputs, self.inputs) if placed is None else placed
        )
        self.place(self.base)  # onto themselves where they lie right, as in a sweep's second wave
        n_layers, n_adapters = self.n_layers, self.n_adapters
        self.a = self.empty(n_layers, n_adapters, self.width, self.inputs)
        self.b = self.empty(n_layers, n_adapters, self.outputs, self.width).zero_()

    def rounded(self, ranks: int) -> int:
        """Return `ranks` rounded up, so that rows of every tensor stay aligned."""
        return -(-ranks // RANK_STEP) * RANK_STEP

    def _scales(self, member: Member) -> Tensor:
        """Return every adapter's scaling in every block, (L, K, 1, 1)."""
        none = torch.zeros(self.n_adapters)
        scales = [m.scaling if isinstance(m, StackedLoRALinear) else none for m in member.modules]
        return torch.stack([s.to(self.device) for s in scales])[:, :, None, None]

    def fill(self) -> None:
        for member, part, slot, _ in self.adapted:
            for layer, module in enumerate(member.modules):
                if isinstance(module, StackedLoRALinear):
                    rank = module.lora_A.shape[1]
                    rows = slice(part.start, part.start + rank)
                    _move(module.lora_A, self.a_slot.values[:, layer, rows])
                    _move(module.lora_B, slot.values[:, layer, :, :rank])
        self.refresh()

    def refresh(self) -> None:
        self.a.copy_(self.a_slot.values.transpose(0, 1))
        for member, part, slot, scale in self.adapted:
            torch.mul(slot.values.transpose(0, 1), scale, out=self.b[:, :, member.rows, part])

    def forward(self, layer: int, x: Tensor, out: Tensor) -> None:
        x, low = x[:, : self.inputs], x[:, self.inputs :]
        bias = None if self.bias is None else self.bias[layer]
        _stacked_matmul(
            self._each(x), self.base[layer].T, bias, self.a[layer].mT, self.b[layer].mT,
            self._each(low), self._each(out),
        )  # fmt: skip

    def backward(self, layer: int, dy: Tensor, dx: Tensor | None) -> None:
        dy, low = self._each(dy[:, : self.outputs]), self._each(dy[:, self.outputs :])
        if dx is None:
            torch.bmm(dy, self.b[layer], out=low)
            return
        _stacked_matmul(
            dy, self.base[layer], None, self.b[layer], self.a[layer], low, self._each(dx)
        )

    def receive(self, layers: slice, x: Tensor, dy: Tensor, *, first: bool) -> None:
        numbers, count = range(self.n_layers)[layers], self.layers_together
        for start in range(0, len(numbers), count):
            some = numbers[start : start + count]
            part = slice(start, start + count)
            self._receive(slice(some[0], some[-1] + 1), x[part], dy[part], first=first)

    @property
    def layers_together(self) -> int:
        """Blocks whose gradients are made at once, before they go into the flat buffer."""
        each = self.n_adapters * self.width * (self.inputs + self.outputs)
        return max(1, min(self.n_layers, MAX_GRADIENT_SCRATCH_ELEMENTS // each))

    def _receive(self, layers: slice, x: Tensor, dy: Tensor, *, first: bool) -> None:
        x, dy = self._each(x.flatten(0, 1), len(x)), self._each(dy.flatten(0, 1), len(dy))
        shape = (-1, self.n_adapters)
        h, dh = self._low(layers, x, dy)  # (layers · K, N, R)
        da = torch.bmm(dh.mT, x[..., : self.inputs]).unflatten(0, shape)  # (layers, K, R, I)
        db = torch.bmm(dy[..., : self.outputs].mT, h).unflatten(0, shape)  # (layers, K, O, R)
        _put(self.a_slot.gradients[:, layers], da.transpose(0, 1), first)
        for member, part, slot, scale in self.adapted:
            block = db[:, :, member.rows, part] * scale[layers]  # (layers, K, O, R)
            _put(slot.gradients[:, layers], block.transpose(0, 1), first)

    def _low(self, layers: slice, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Return x Aᵀ and s · dy B, (layers · K, N, R) each."""
        return x[..., self.inputs :], dy[..., self.outputs :]

    def _each(self, rows: Tensor, times: int = 1) -> Tensor:
        """Return `rows` (times · K · N, W) by adapter, (times · K, N, W)."""
        return rows.unflatten(0, (times * self.n_adapters, -1))


class MergedStackedProjection(StackedProjection):
    """y = x (W + s_k B_k A_k)ᵀ: the sums of all adapters and blocks are made once a step.

    Their gradients' low-rank parts are made from what is kept, for many blocks together.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[nn.Module]],
        flat: StackedFlat,
        dtype: torch.dtype,
        ops: Ops,
    ) -> None:
        super().__init__(blocks, flat, dtype)
        self.extra, self.ops = 0, ops
        self.weight = self.empty(self.n_layers, self.n_adapters, self.outputs, self.inputs)

    def rounded(self, ranks: int) -> int:
        return max(RANK_STEP, 1 << (ranks - 1).bit_length())  # the kernel wants a power of two

    def refresh(self) -> None:
        super().refresh()
        b, a, weight = (t.flatten(0, 1) for t in (self.b, self.a, self.weight))
        self.ops.add_low_rank(self.base, b, a, weight)

    def forward(self, layer: int, x: Tensor, out: Tensor) -> None:
        x, out, weight = self._each(x), self._each(out), self.weight[layer].mT
        if self.bias is None:
            torch.bmm(x, weight, out=out)
        else:
            torch.baddbmm(self.bias[layer], x, weight, out=out)

    def backward(self, layer: int, dy: Tensor, dx: Tensor | None) -> None:
        if dx is not None:
            torch.bmm(self._each(dy), self.weight[layer], out=self._each(dx))

    def _low(self, layers: slice, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.a[layers].flatten(0, 1), self.b[layers].flatten(0, 1)
        return torch.bmm(x, a.mT), torch.bmm(dy, b)


def _put(target: Tensor, gradient: Tensor, first: bool) -> None:
    target.copy_(gradient) if first else target.add_(gradient)


def _move(parameter: nn.Parameter, view: Tensor) -> None:
    view.copy_(parameter)
    parameter.data = view


def _stacked_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    first: Tensor,
    second: Tensor,
    low: Tensor,
    out: Tensor,
) -> None:
    """Changes `low` and `out` in place: x · first, and x · weight + bias + low · second.

    `x` is (K, N, I), `weight` (I, O), `bias` (O,), `first` (K, I, R), `second` (K, R, O), `low`
    (K, N, R) and `out` (K, N, O). x, low and out may lie among other columns; the rows of an
    adapter follow those of the one before.
    """
    torch.bmm(x, first, out=low)
    rows, all_rows = x.flatten(0, 1), out.flatten(0, 1)  # views: (K·N, I), (K·N, O)
    if bias is None:
        torch.mm(rows, weight, out=all_rows)
    else:
        torch.addmm(bias, rows, weight, out=all_rows)
    out.baddbmm_(low, second)
