"""One matrix product for all linears that read the same input: the weights of all blocks as one.

Gradients of all blocks are made together at the end, from the inputs and output gradients that
the blocks left in their buffers. The kinds with LoRA are in `lora.fast.weights.adapted`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lora.fast.weights.flat import FlatParameters, Slot
from lora.kernels.step.fp8 import Fp8Rows


@dataclass(frozen=True)
class Member:
    """One linear of a projection, in all blocks."""

    modules: tuple[nn.Module, ...]
    """By block."""
    rows: slice
    """Its outputs among the projection's."""


def list_members(blocks: Sequence[Sequence[nn.Module]]) -> list[Member]:
    """Return the members of a projection from its linears, by block and then by place."""
    members, start = [], 0
    for modules in zip(*blocks, strict=True):
        rows = slice(start, start + _sizes(modules[0])[0])
        members.append(Member(tuple(modules), rows))
        start = rows.stop
    return members


class Projection:
    """What the kinds share: the base's weights, frozen, in one tensor (L, O, I)."""

    extra = 0
    """Columns beyond the inputs (and outputs) that the caller's buffers must have."""

    def __init__(self, blocks: Sequence[Sequence[nn.Module]], dtype: torch.dtype) -> None:
        self.members = list_members(blocks)
        self.n_layers, self.dtype = len(blocks), dtype
        self.device = weight_of(blocks[0][0]).device
        self.inputs, self.outputs = _sizes(blocks[0][0])[1], self.members[-1].rows.stop
        self.bias: Tensor | None = None

    def place(self, weight: Tensor) -> None:
        """Changes the modules in place: their weights move into `weight` (L, O, I), as views."""
        self.move(list(weight), slice(None))
        self._place_biases()

    def move(self, weights: Sequence[Tensor], layers: slice) -> None:
        """Changes the modules of `layers` in place: their weights become views of (O, I) each."""
        for member in self.members:
            for weight, module in zip(weights, member.modules[layers], strict=True):
                view = weight[member.rows]  # (O of the member, I)
                view.copy_(weight_of(module))
                weight_of(module).data = view

    def placed(self) -> Tensor | None:
        """Return the weights as one tensor (L, O, I) if an earlier step has put them there."""
        first = weight_of(self.members[0].modules[0])
        start, size = first.data_ptr(), first.element_size() * self.inputs
        for member in self.members:
            for layer, module in enumerate(member.modules):
                weight = weight_of(module)
                place = start + (layer * self.outputs + member.rows.start) * size
                if weight.data_ptr() != place or weight.dtype is not self.dtype:
                    return None
        whole = self.n_layers * self.outputs * size
        if start + whole > first.untyped_storage().data_ptr() + first.untyped_storage().nbytes():
            return None
        return first.detach().as_strided(
            (self.n_layers, self.outputs, self.inputs), (self.outputs * self.inputs, self.inputs, 1)
        )

    def _place_biases(self) -> None:
        modules = [m.modules[0] for m in self.members]
        if all(bias_of(module) is None for module in modules):
            return
        self.bias = self.empty(self.n_layers, self.outputs).zero_()
        for member in self.members:
            for layer, module in enumerate(member.modules):
                bias = bias_of(module)
                if bias is not None:
                    view = self.bias[layer, member.rows]
                    view.copy_(bias)
                    bias.data = view

    def empty(self, *shape: int) -> Tensor:
        """Return an uninitialised tensor of the projection's type, on its device."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def multiply(self, layer: int, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """Changes `out` (N, O) in place: x (N, K) times `weight` (O, K), and the bias."""
        if self.bias is None:
            torch.mm(x, weight.T, out=out)
        else:
            torch.addmm(self.bias[layer], x, weight.T, out=out)

    def fill(self) -> None:
        """Put the parameters' values into their slots, once these are allocated."""

    def refresh(self) -> None:
        """Bring what the products read up to date with the slots."""

    def fp8_inputs(self, x: Tensor) -> Fp8Rows | None:
        """Return where the maker of `x` (N, I) also puts it in eight bits; None: nowhere."""
        return None

    def fp8_gradients(self, layer: int, dy: Tensor) -> Fp8Rows | None:
        """Return where the maker of `dy` (N, O) also puts it in eight bits."""
        return None

    def forward(self, layer: int, x: Tensor, out: Tensor) -> None:
        """Changes `out` (N, O) in place: the outputs for `x` (N, I + extra)."""
        raise NotImplementedError

    def backward(self, layer: int, dy: Tensor, dx: Tensor | None) -> None:
        """Changes `dx` (N, I) in place, from `dy` (N, O + extra); None: nobody needs it."""
        raise NotImplementedError

    def receive(self, layers: slice, x: Tensor, dy: Tensor, *, first: bool) -> None:
        """Put the gradients of `layers` into their slots.

        `x` is (layers, N, I + extra), `dy` (layers, N, O + extra), as forward and backward left
        them. `first`: of the step's first micro-batch.
        """


class FrozenProjection(Projection):
    """No linear of it trains."""

    def __init__(self, blocks: Sequence[Sequence[nn.Module]], dtype: torch.dtype) -> None:
        super().__init__(blocks, dtype)
        self.weights: list[Tensor] = []
        for layer in range(self.n_layers):  # one by one: a large base is never there twice
            self.weights.append(self.empty(self.outputs, self.inputs))
            self.move(self.weights[layer:], slice(layer, layer + 1))
        self._place_biases()

    def forward(self, layer: int, x: Tensor, out: Tensor) -> None:
        self.multiply(layer, x, self.weights[layer], out)

    def backward(self, layer: int, dy: Tensor, dx: Tensor | None) -> None:
        if dx is not None:
            torch.mm(dy, self.weights[layer], out=dx)


class FullProjection(Projection):
    """All of it trains: fp32 values in the slot, a copy of the products' type beside them."""

    def __init__(
        self, blocks: Sequence[Sequence[nn.Module]], flat: FlatParameters, dtype: torch.dtype
    ) -> None:
        super().__init__(blocks, dtype)
        self.slot = flat.reserve((self.n_layers, self.outputs, self.inputs), decays=True)
        self.bias_slot: Slot | None = None
        if any(bias_of(member.modules[0]) is not None for member in self.members):
            self.bias_slot = flat.reserve((self.n_layers, self.outputs), decays=False)

    def fill(self) -> None:
        self.place(self.slot.values)
        self.weight = self.slot.values.to(self.dtype)  # the values themselves where types agree
        self.refresh()

    def _place_biases(self) -> None:
        if self.bias_slot is None:
            return
        self.bias = self.empty(self.n_layers, self.outputs)
        for member in self.members:
            for layer, module in enumerate(member.modules):
                bias = bias_of(module)
                if bias is not None:
                    view = self.bias_slot.values[layer, member.rows]
                    view.copy_(bias)
                    bias.data = view

    def refresh(self) -> None:
        if self.weight.data_ptr() != self.slot.values.data_ptr():
            self.weight.copy_(self.slot.values)
        if self.bias is not None and self.bias_slot is not None:
            self.bias.copy_(self.bias_slot.values)

    def forward(self, layer: int, x: Tensor, out: Tensor) -> None:
        self.multiply(layer, x, self.weight[layer], out)

    def backward(self, layer: int, dy: Tensor, dx: Tensor | None) -> None:
        if dx is not None:
            torch.mm(dy, self.weight[layer], out=dx)

    def receive(self, layers: slice, x: Tensor, dy: Tensor, *, first: bool) -> None:
        parts = range(self.n_layers)[layers]
        for place, layer in enumerate(parts):  # one block at a time: no second tensor of all
            target = self.slot.gradients[layer]
            gradient = dy[place].T @ x[place]  # (O, I)
            target.copy_(gradient) if first else target.add_(gradient)
        if self.bias_slot is not None:
            total = dy.sum(1, dtype=self.bias_slot.values.dtype)  # (layers, O)
            target = self.bias_slot.gradients[layers]
            target.copy_(total) if first else target.add_(total)


def weight_of(module: nn.Module) -> nn.Parameter:
    """Return the weight (O, I) of a linear, with LoRA or without."""
    return cast(nn.Parameter, module.weight)


def bias_of(module: nn.Module) -> nn.Parameter | None:
    """Return the bias (O,) of a linear, if it has one."""
    return cast("nn.Parameter | None", module.bias)


def _sizes(module: nn.Module) -> tuple[int, int]:
    rows, columns = weight_of(module).shape
    return rows, columns
