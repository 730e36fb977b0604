"""The linears of one place in all blocks, for steps by hand on a CPU.

What differs from `lora.fast.projections`: results are new tensors, because the faster library for
large products (`lora.kernels.products`) makes them; and LoRA's gradients come the cheaper way for
the layer's size: from products with A and B, or, where the weight is small, from dW, which is
then formed as full fine-tuning forms it and met with A and B once a step for all blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora.fast.adapted import MergedProjection
from lora.fast.flat import FlatParameters
from lora.fast.ops import PLAIN
from lora.fast.projections import FrozenProjection, FullProjection
from lora.kernels.products import product, transposed_product
from lora.lora_module import LoRALayer

NARROW_COST = 3.5
"""How much dearer a multiplication is in products with A and B than in one that forms dW."""
LEAST_RANK = 16
"""Lower ranks take no less time."""


class MergedLinears(MergedProjection):
    """W + s·B·A, made once a step for all blocks."""

    def __init__(
        self, blocks: Sequence[Sequence[nn.Module]], flat: FlatParameters, dtype: torch.dtype
    ) -> None:
        super().__init__(blocks, flat, dtype, PLAIN)
        n_in, n_out = self.inputs, self.outputs
        forms = n_in * n_out <= NARROW_COST * max(self.width, LEAST_RANK) * (n_in + n_out)
        self.formed = torch.empty_like(self.base) if forms else None  # dW, (L, O, I)

    def fill(self) -> None:
        # Views of the slots, made once: at small sizes making them is a good part of a step.
        self.a, self.da = self.a_slot.values, self.a_slot.gradients  # (L, R, I)
        self.scaled = [
            (slot.values, slot.gradients, scale, member.rows, part)
            for member, part, slot, scale in self.adapted
        ]
        self.into_b = [self.b[:, rows, part] for *_, rows, part in self.scaled]
        super().fill()
        self.by_layer = list(zip(self.a, self.b.mT, strict=True))  # (R, I), (R, O)

    def refresh(self) -> None:
        for (values, _, scale, *_), target in zip(self.scaled, self.into_b, strict=True):
            torch.mul(values, scale, out=target)
        torch.baddbmm(self.base, self.b, self.a, out=self.weight)

    def rounded(self, ranks: int) -> int:
        return ranks

    def receive(self, layers: slice, x: Tensor, dy: Tensor, *, first: bool) -> None:
        for layer, one_x, one_dy in zip(range(self.n_layers)[layers], x, dy, strict=True):
            self.receive_one(layer, one_x, one_dy, first=first)

    def receive_one(self, layer: int, x: Tensor, dy: Tensor, *, first: bool) -> None:
        """Take in x (N, I) and dy (N, O) of one block."""
        if self.formed is not None:
            into = self.formed[layer]
            torch.mm(dy.T, x, out=into) if first else into.addmm_(dy.T, x)
            return
        a, b = self.by_layer[layer]
        low, dlow = product(x, a), product(dy, b)  # (N, R)
        da = transposed_product(dlow, x)  # (R, I)
        db = transposed_product(low, dy).T  # (O, R); dyᵀ low is several times slower
        self.store(slice(layer, layer + 1), da[None], db[None], first=first)

    def finish(self) -> None:
        """Put LoRA's gradients into their slots, if they come from dW."""
        if self.formed is not None:
            torch.bmm(self.b.mT, self.formed, out=self.da)  # (L, R, I)
            db = torch.bmm(self.formed, self.a.mT)  # (L, O, R)
            for _, gradients, scale, rows, part in self.scaled:
                torch.mul(db[:, rows, part], scale, out=gradients)


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
        trains_whole: bool,
    ) -> None:
        self.kind: MergedLinears | FullProjection | FrozenProjection
        if trains_whole:
            self.kind = FullProjection(blocks, flat, dtype)
        elif any(isinstance(module, LoRALayer) for block in blocks for module in block):
            self.kind = MergedLinears(blocks, flat, dtype)
        else:
            self.kind = FrozenProjection(blocks, dtype)

    def fill(self) -> None:
        """Put the parameters' values into their slots, once these are allocated."""
        kind = self.kind
        kind.fill()
        # Views of one block each, made once: at small sizes making them is a good part of a step.
        self.weights = list(kind.weights if isinstance(kind, FrozenProjection) else kind.weight)
        self.transposed = [weight.T for weight in self.weights]
        self.biases = [None] * kind.n_layers if kind.bias is None else list(kind.bias)

    def refresh(self) -> None:
        """Bring the weights that products read up to date."""
        self.kind.refresh()

    def forward(self, layer: int, x: Tensor) -> Tensor:
        """Return y (N, O) of x (N, I)."""
        return product(x, self.weights[layer], self.biases[layer])

    def backward(self, layer: int, x: Tensor, dy: Tensor, *, first: bool) -> Tensor:
        """Return dx (N, I); the gradients of what trains are added up, or begun if `first`."""
        if isinstance(self.kind, MergedLinears):
            self.kind.receive_one(layer, x, dy, first=first)
        else:
            self.kind.receive(slice(layer, layer + 1), x[None], dy[None], first=first)
        return product(dy, self.transposed[layer])

    def finish(self) -> None:
        """Complete the gradients, after the step's last micro-batch."""
        if isinstance(self.kind, MergedLinears):
            self.kind.finish()
