"""Projections with the LoRA of K stacked adapters: two ways to add B_k·A_k to W.

- `StackedProjection`: one matmul of all rows with W, batched narrow ones by adapter.
- `MergedStackedProjection` adds s_k·B_k·A_k to W once a step, for all adapters and blocks at once:
  K merged weights, and no small matmul is left in the sequence of blocks.

What differs from `lora.fast.weights.adapted`: the rows of the buffers are the tokens of adapter 0,
then those of adapter 1, and so on, and the A of linears that read the same input are one matrix (K,
R, I) for each block. A row of a matmul depends on that row alone, and the low-rank part of an
adapter on its own rows, so a NaN of one adapter reaches no other. Smaller ranks are padded with
zero rows of A and columns of B; as both factors are zero there, the gradients of padding are zero
too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora.fast.weights.flat import Slot, accumulate
from lora.fast.weights.projections import Member, Projection
from lora.fast.weights.stacked_flat import StackedFlat
from lora.kernels.step.ops import Ops
from lora.stacked.layers import StackedLoRALinear

RANK_STEP = 16
"""Columns for LoRA come in multiples of this, so that rows of every buffer stay aligned."""
MAX_GRADIENT_SCRATCH_ELEMENTS = 2**25
"""Gradients of A and B that exist in the compute dtype before they are added to the flat buffer."""


class StackedProjection(Projection):
    """y = x Wᵀ + (x A_kᵀ) (s_k B_k)ᵀ for the rows of each adapter k.

    `x` (K·N, I + R) holds x Aᵀ in its last columns, `dy` (K·N, O + R) holds s · dy B.
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
                columns = slice(start, start + max(ranks))
                outputs = member.rows.stop - member.rows.start
                slot = flat.reserve((self.n_layers, outputs, max(ranks)), decays=True)
                self.adapted.append((member, columns, slot, self._scales(member)))
                start = columns.stop
        self.width = self.extra = self.rounded_rank(start)
        """R: all members' ranks together, rounded up."""
        self.a_slot = flat.reserve((self.n_layers, self.width, self.inputs), decays=True)
        self.bind_base()
        n_layers, n_adapters = self.n_layers, self.n_adapters
        self.a = self.empty(n_layers, n_adapters, self.width, self.inputs)
        self.b = self.empty(n_layers, n_adapters, self.outputs, self.width).zero_()

    def bind_base(self) -> None:
        """Changes the modules in place: the base's weights become views of one tensor."""
        bound = None if self.device.type == "meta" else self.find_bound()
        self.base = (
            self.empty(self.n_layers, self.outputs, self.inputs) if bound is None else bound
        )  # (L, O, I)
        self.weights = list(self.base)
        """By block, (O, I)."""
        self.bind(self.base)  # copies onto themselves in a sweep's second wave

    def rounded_rank(self, ranks: int) -> int:
        """Return `ranks` rounded up, so that rows of every buffer stay aligned."""
        return -(-ranks // RANK_STEP) * RANK_STEP

    def _scales(self, member: Member) -> Tensor:
        """Return every adapter's scaling in every block, (L, K, 1, 1)."""
        none = torch.zeros(self.n_adapters)
        scales = [m.scaling if isinstance(m, StackedLoRALinear) else none for m in member.modules]
        return torch.stack([s.to(self.device) for s in scales])[:, :, None, None]

    def fill(self) -> None:
        for member, columns, slot, _ in self.adapted:
            for layer, module in enumerate(member.modules):
                if isinstance(module, StackedLoRALinear):
                    rank = module.lora_A.shape[1]
                    rows = slice(columns.start, columns.start + rank)
                    _move(module.lora_A, self.a_slot.values[:, layer, rows])
                    _move(module.lora_B, slot.values[:, layer, :, :rank])
        self.refresh()

    def refresh(self) -> None:
        # By block here, by adapter in the flat buffer: a block's matmul batches over adapters,
        # while AdamW, norms and checks want an adapter's numbers side by side.
        self.a.copy_(self.a_slot.values.transpose(0, 1))  # (L, K, R, I)
        for member, columns, slot, scale in self.adapted:
            b = slot.values.transpose(0, 1)  # (L, K, O, R)
            torch.mul(b, scale, out=self.b[:, :, member.rows, columns])

    def forward(self, layer: int, x: Tensor, out: Tensor) -> None:
        x, low = x[:, : self.inputs], x[:, self.inputs :]
        bias = None if self.bias is None else self.bias[layer]
        _stacked_matmul(
            self._by_adapter(x), self.weights[layer].T, bias, self.a[layer].mT, self.b[layer].mT,
            self._by_adapter(low), self._by_adapter(out),
        )  # fmt: skip

    def backward(self, layer: int, dy: Tensor, dx: Tensor | None) -> None:
        dy, low = self._by_adapter(dy[:, : self.outputs]), self._by_adapter(dy[:, self.outputs :])
        if dx is None:
            torch.bmm(dy, self.b[layer], out=low)
            return
        _stacked_matmul(
            dy, self.weights[layer], None, self.b[layer], self.a[layer], low, self._by_adapter(dx)
        )

    def accumulate_gradients(self, layers: slice, x: Tensor, dy: Tensor, *, first: bool) -> None:
        indices, count = range(self.n_layers)[layers], self.layers_together
        for start in range(0, len(indices), count):
            some, part = indices[start : start + count], slice(start, start + count)
            self._accumulate_layers(slice(some[0], some[-1] + 1), x[part], dy[part], first=first)

    @property
    def layers_together(self) -> int:
        """Blocks whose gradients are computed at once, before they go into the flat buffer."""
        each = self.n_adapters * self.width * (self.inputs + self.outputs)
        return max(1, min(self.n_layers, MAX_GRADIENT_SCRATCH_ELEMENTS // each))

    def _accumulate_layers(self, layers: slice, x: Tensor, dy: Tensor, *, first: bool) -> None:
        x, dy = (
            self._by_adapter(x.flatten(0, 1), len(x)),
            self._by_adapter(dy.flatten(0, 1), len(dy)),
        )
        shape = (-1, self.n_adapters)
        h, dh = self._low_rank(layers, x, dy)  # (layers · K, N, R)
        da = torch.bmm(dh.mT, x[..., : self.inputs]).unflatten(0, shape)  # (layers, K, R, I)
        db = torch.bmm(dy[..., : self.outputs].mT, h).unflatten(0, shape)  # (layers, K, O, R)
        accumulate(self.a_slot.gradients[:, layers], da.transpose(0, 1), first=first)
        for member, columns, slot, scale in self.adapted:
            block = db[:, :, member.rows, columns] * scale[layers]  # (layers, K, O, R)
            accumulate(slot.gradients[:, layers], block.transpose(0, 1), first=first)

    def _low_rank(self, layers: slice, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Return x Aᵀ and s · dy B, (layers · K, N, R) each."""
        return x[..., self.inputs :], dy[..., self.outputs :]

    def _by_adapter(self, rows: Tensor, times: int = 1) -> Tensor:
        """Return `rows` (times · K · N, W) by adapter, (times · K, N, W), as a view."""
        return rows.unflatten(0, (times * self.n_adapters, -1))


class MergedStackedProjection(StackedProjection):
    """y = x (W + s_k B_k A_k)ᵀ: the weights of all adapters and blocks are merged once a step.

    x Aᵀ and dy B are computed with the gradients, for many blocks together.
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

    def rounded_rank(self, ranks: int) -> int:
        return max(RANK_STEP, 1 << (ranks - 1).bit_length())  # Triton's ranges are powers of two

    def refresh(self) -> None:
        super().refresh()
        b, a, weight = (t.flatten(0, 1) for t in (self.b, self.a, self.weight))
        self.ops.add_low_rank(self.base, b, a, weight)

    def forward(self, layer: int, x: Tensor, out: Tensor) -> None:
        x, out, weight = self._by_adapter(x), self._by_adapter(out), self.weight[layer].mT
        if self.bias is None:
            torch.bmm(x, weight, out=out)
        else:
            torch.baddbmm(self.bias[layer], x, weight, out=out)

    def backward(self, layer: int, dy: Tensor, dx: Tensor | None) -> None:
        if dx is not None:
            torch.bmm(self._by_adapter(dy), self.weight[layer], out=self._by_adapter(dx))

    def _low_rank(self, layers: slice, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.a[layers].flatten(0, 1), self.b[layers].flatten(0, 1)
        return torch.bmm(x, a.mT), torch.bmm(dy, b)


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
    (K, N, R) and `out` (K, N, O). x, low and out may be columns of wider tensors; the rows of an
    adapter follow those of the one before.
    """
    torch.bmm(x, first, out=low)
    # All rows meet W in one matmul, as large as the batch; only the narrow ones are by adapter.
    rows, all_rows = x.flatten(0, 1), out.flatten(0, 1)  # views: (K·N, I), (K·N, O)
    if bias is None:
        torch.mm(rows, weight, out=all_rows)
    else:
        torch.addmm(bias, rows, weight, out=all_rows)
    out.baddbmm_(low, second)
