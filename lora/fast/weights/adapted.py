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

from lora.fast.weights.flat import FlatParameters, Slot, accumulate
from lora.fast.weights.projections import Member, Projection
from lora.kernels.step.ops import Ops
from lora.lora_module import LoRALayer
from lora.stacked.layers import StackedLoRALinear

RANK_STEP = 16
"""Columns for LoRA come in multiples of this, so that rows of every buffer stay aligned."""
GROUP_BYTES = 1.2e9
"""Weights of one projection that are copied at once."""


class DropoutMasks:
    """Dropout's probability, its seed on the device, and an index for every mask of a step."""

    def __init__(self, p: float, device: torch.device) -> None:
        self.p, self._next = p, 0
        # On the device, so that a replayed graph draws other masks in every step.
        self.seed = torch.zeros((), dtype=torch.int64, device=device)
        self.first_row = 0
        """Of the tokens here among those of the micro-batch, of which others may have a part."""

    def reserve(self, count: int) -> int:
        """Return the first of `count` indices that no other projection has."""
        first, self._next = self._next, self._next + count
        return first


class _LoRAProjection(Projection):
    """What the projections with LoRA share: slots for A and B, their layout, their gradients.

    The A of all members are one matrix (R, I), the members' ranks side by side, padded to R.
    """

    def __init__(
        self, blocks: Sequence[Sequence[nn.Module]], flat: FlatParameters, dtype: torch.dtype
    ) -> None:
        super().__init__(blocks, dtype)
        self.device = flat.device  # sharded weights are on no device at first
        self.adapted: list[tuple[Member, slice, Slot, Tensor]] = []
        start = 0
        for member in self.members:
            ranks = [m.rank for m in member.modules if isinstance(m, LoRALayer)]
            if ranks:
                columns = slice(start, start + max(ranks))
                outputs = member.rows.stop - member.rows.start
                slot = flat.reserve((self.n_layers, outputs, max(ranks)), decays=True)  # (L, O, R)
                # Zero where a block's linear has no LoRA: its A and B are zeros as well, and stay.
                scales = [m.scaling if isinstance(m, LoRALayer) else 0.0 for m in member.modules]
                scale = torch.tensor(scales, dtype=flat.dtype, device=self.device)[:, None, None]
                self.adapted.append((member, columns, slot, scale))
                start = columns.stop
        self.width = self.rounded_rank(start)
        """R: all members' ranks together, rounded up."""
        self.a_slot = flat.reserve((self.n_layers, self.width, self.inputs), decays=True)

    def rounded_rank(self, ranks: int) -> int:
        """Return `ranks` rounded up, so that rows of every buffer stay aligned."""
        return -(-ranks // RANK_STEP) * RANK_STEP

    def fill(self) -> None:
        for member, columns, slot, _ in self.adapted:
            for layer, module in enumerate(member.modules):
                if isinstance(module, LoRALayer):
                    rows = slice(columns.start, columns.start + module.rank)
                    _move(module.lora_A, self.a_slot.values[layer, rows])
                    _move(module.lora_B, slot.values[layer, :, : module.rank])
        self.refresh()

    def copy_adapters(self, a: Tensor, b: Tensor, layers: slice = slice(None)) -> None:
        """Changes `a` (layers, R, I) and `b` (layers, O, R) in place: the slots' A, and s · B.

        s is in B so that no pass of its own scales an output or a gradient.
        """
        a.copy_(self.a_slot.values[layers])  # rounds fp32 to the compute dtype
        for member, columns, slot, scale in self.adapted:
            torch.mul(slot.values[layers], scale[layers], out=b[:, member.rows, columns])

    def accumulate_low_rank(
        self, layers: slice, x: Tensor, dy: Tensor, h: Tensor, dh: Tensor, *, first: bool
    ) -> None:
        """Add dA = dhᵀ x and dB = s · dyᵀ h to their slots; all are (layers, N, …)."""
        self.accumulate_ab(layers, torch.bmm(dh.mT, x), torch.bmm(dy.mT, h), first=first)

    def accumulate_ab(self, layers: slice, da: Tensor, db: Tensor, *, first: bool) -> None:
        """Add dA (layers, R, I) and s · dB to their slots; `db` (layers, O, R) is without s."""
        accumulate(self.a_slot.gradients[layers], da, first=first)
        for member, columns, slot, scale in self.adapted:
            # Of a member only its own columns of h: dyᵀ h holds all members' pairs.
            block = db[:, member.rows, columns]
            target = slot.gradients[layers]
            if first:
                torch.mul(block, scale[layers], out=target)
            else:
                target.add_(block * scale[layers])


class ConcatenatedLoRAProjection(_LoRAProjection):
    """LoRA's matrices in the same tensor as W: (O + R, I + R) a block.

    Blocks are copied in groups, so that a large base is never there twice.
    """

    def __init__(
        self, blocks: Sequence[Sequence[nn.Module]], flat: FlatParameters, dtype: torch.dtype
    ) -> None:
        super().__init__(blocks, flat, dtype)
        self.extra = self.width
        self.groups: list[tuple[slice, Tensor]] = []
        """Blocks, and their [[W, s·B], [A, 0]]: (blocks, O + R, I + R)."""
        self.weights: list[Tensor] = []
        """The same by block, (O + R, I + R)."""
        self.bind_base()

    def bind_base(self) -> None:
        """Changes the modules in place: the base's weights become views of `weights`."""
        a_block = (self.outputs + self.width) * (self.inputs + self.width) * self.dtype.itemsize
        at_once = max(1, int(GROUP_BYTES / a_block))
        for start in range(0, self.n_layers, at_once):
            layers = slice(start, min(start + at_once, self.n_layers))
            count = layers.stop - start
            whole = self.empty(count, self.outputs + self.width, self.inputs + self.width)
            # `refresh` writes only the adapted members' parts: the others and the padding stay 0.
            whole[:, : self.outputs, self.inputs :] = 0
            whole[:, self.outputs :, self.inputs :] = 0
            self.groups.append((layers, whole))
            self.weights += list(whole)
            self.bind_layers([w[: self.outputs, : self.inputs] for w in whole], layers)
        self._bind_biases()

    def refresh(self) -> None:
        for layers, whole in self.groups:
            a = whole[:, self.outputs :, : self.inputs]  # (layers, R, I)
            b = whole[:, : self.outputs, self.inputs :]  # (layers, O, R), scaled
            self.copy_adapters(a, b, layers)

    def forward(self, layer: int, x: Tensor, out: Tensor) -> None:
        whole = self.weights[layer]
        a = whole[self.outputs :, : self.inputs]  # (R, I)
        # x Aᵀ lands beside x, so the large matmul reads [x, x Aᵀ] as one matrix.
        torch.mm(x[:, : self.inputs], a.T, out=x[:, self.inputs :])  # (N, R)
        self.matmul(layer, x, whole[: self.outputs], out)  # by [W, s·B]

    def backward(self, layer: int, dy: Tensor, dx: Tensor | None) -> None:
        whole = self.weights[layer]
        b = whole[: self.outputs, self.inputs :]  # (O, R), scaled
        # Needed for dA even where dx is not.
        torch.mm(dy[:, : self.outputs], b, out=dy[:, self.outputs :])  # (N, R)
        if dx is not None:
            torch.mm(dy, whole[:, : self.inputs], out=dx)  # by [W; A]

    def accumulate_gradients(self, layers: slice, x: Tensor, dy: Tensor, *, first: bool) -> None:
        x, h = x[..., : self.inputs], x[..., self.inputs :]
        dy, dh = dy[..., : self.outputs], dy[..., self.outputs :]
        self.accumulate_low_rank(layers, x, dy, h, dh, first=first)


class MergedProjection(_LoRAProjection):
    """W + s·B·A, merged once a step for all blocks; no buffer has + R columns."""

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
        # Zeros in the blocks of B that pair one member's outputs with another's ranks.
        self.b = self.empty(self.n_layers, self.outputs, self.width).zero_()
        self.bind(self.base)

    def rounded_rank(self, ranks: int) -> int:
        return max(RANK_STEP, 1 << (ranks - 1).bit_length())  # Triton's ranges are powers of two

    def refresh(self) -> None:
        self.copy_adapters(self.a, self.b)
        self.ops.add_low_rank(self.base, self.b, self.a, self.weight)

    def forward(self, layer: int, x: Tensor, out: Tensor) -> None:
        self.matmul(layer, x, self.weight[layer], out)

    def backward(self, layer: int, dy: Tensor, dx: Tensor | None) -> None:
        if dx is not None:
            torch.mm(dy, self.weight[layer], out=dx)

    def accumulate_gradients(self, layers: slice, x: Tensor, dy: Tensor, *, first: bool) -> None:
        # Forward and backward had no use for x Aᵀ and dy B, so they are computed here, batched.
        h = torch.bmm(x, self.a[layers].mT)  # (layers, N, R)
        dh = torch.bmm(dy, self.b[layers])  # (layers, N, R)
        self.accumulate_low_rank(layers, x, dy, h, dh, first=first)


class SeparateLoRAProjection(_LoRAProjection):
    """LoRA in matmuls of its own: y = x Wᵀ, then y += (x Aᵀ) (s·B)ᵀ.

    With `masks` dropout is applied to its inputs; linears that share inputs share the mask.
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
        self.first_mask = 0 if masks is None else masks.reserve(len(blocks))
        self.extra = self.width
        self.a = self.empty(self.n_layers, self.width, self.inputs)
        self.b = self.empty(self.n_layers, self.outputs, self.width).zero_()
        self.bind_base()

    def bind_base(self) -> None:
        """Changes the modules in place: the base's weights become views of one tensor."""
        base = self.empty(self.n_layers, self.outputs, self.inputs)
        self.weights = list(base)
        """By block, (O, I)."""
        self.bind(base)

    def base_forward(self, layer: int, x: Tensor, out: Tensor) -> None:
        """Changes `out` (N, O) in place: x Wᵀ and the bias, for x (N, I)."""
        self.matmul(layer, x, self.weights[layer], out)

    def base_backward(self, layer: int, dy: Tensor, dx: Tensor) -> None:
        """Changes `dx` (N, I) in place: dy W, for dy (N, O)."""
        torch.mm(dy, self.weights[layer], out=dx)

    def refresh(self) -> None:
        self.copy_adapters(self.a, self.b)

    def _dropped(self, layer: int, x: Tensor) -> Tensor:
        """Return LoRA's inputs (N, I)."""
        if self.masks is None:
            return x
        # Recomputed wherever it is needed: the mask is a function of seed and index, so neither it
        # nor the result is stored.
        out = torch.empty_like(x)
        masks = self.masks
        self.ops.drop(x, out, masks.seed, self.first_mask + layer, masks.p, masks.first_row)
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
        # The mask lies between A and x, so this part cannot be added by the matmul itself.
        low = dh @ self.a[layer]  # (N, I)
        masks, mask = self.masks, self.first_mask + layer
        self.ops.add_dropped(low, dx, masks.seed, mask, masks.p, masks.first_row)

    def accumulate_gradients(self, layers: slice, x: Tensor, dy: Tensor, *, first: bool) -> None:
        if self.masks is None:
            h, dh = x[..., self.inputs :], dy[..., self.outputs :]
            self.accumulate_low_rank(
                layers, x[..., : self.inputs], dy[..., : self.outputs], h, dh, first=first
            )
            return
        # Block by block: the dropped inputs of all at once would be a second attention_in.
        for index, layer in enumerate(range(self.n_layers)[layers]):
            dropped = self._dropped(layer, x[index, :, : self.inputs])  # (N, I)
            h, dh = x[index, :, self.inputs :], dy[index, :, self.outputs :]  # each (N, R)
            d_outputs = dy[index, :, : self.outputs]  # (N, O)
            one = slice(layer, layer + 1)
            self.accumulate_low_rank(
                one, dropped[None], d_outputs[None], h[None], dh[None], first=first
            )


def has_lora(blocks: Sequence[Sequence[nn.Module]]) -> bool:
    """Whether LoRA of one adapter or of several is on any of these linears, given by block."""
    kinds = LoRALayer | StackedLoRALinear
    return any(isinstance(module, kinds) for block in blocks for module in block)


def _move(parameter: Tensor, view: Tensor) -> None:
    view.copy_(parameter)
    parameter.data = view
