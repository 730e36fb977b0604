"""Linears that read the same input as one matmul: frozen, or training in full.

Weight gradients of all blocks are computed together after the backward pass, from the inputs and
output gradients that the blocks left in their buffers. The projections with LoRA are in
`lora.fast.weights.adapted`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lora.fast.weights.flat import FlatParameters, Slot, accumulate
from lora.kernels.step.fp8 import Fp8Rows


@dataclass(frozen=True)
class Member:
    """One linear of a projection, in all blocks."""

    modules: tuple[nn.Module, ...]
    """By block."""
    rows: slice
    """Its outputs among the projection's, which are rows of W (O, I)."""


def list_members(blocks: Sequence[Sequence[nn.Module]]) -> list[Member]:
    """Return the members of a projection from its linears, given by block."""
    members, start = [], 0
    for modules in zip(*blocks, strict=True):
        rows = slice(start, start + _sizes(modules[0])[0])
        members.append(Member(tuple(modules), rows))
        start = rows.stop
    return members


class Projection:
    """One matmul in each block; the modules' weights become views of its tensors (O, I)."""

    extra = 0
    """Columns + R beyond the inputs (and outputs) that the buffers must have."""

    def __init__(self, blocks: Sequence[Sequence[nn.Module]], dtype: torch.dtype) -> None:
        self.members = list_members(blocks)
        self.n_layers, self.dtype = len(blocks), dtype
        self.device = weight_of(blocks[0][0]).device
        self.inputs, self.outputs = _sizes(blocks[0][0])[1], self.members[-1].rows.stop
        self.bias: Tensor | None = None

    def bind(self, weight: Tensor) -> None:
        """Changes the modules in place: their weights become views of `weight` (L, O, I)."""
        self.bind_layers(list(weight), slice(None))
        self._bind_biases()

    def bind_layers(self, weights: Sequence[Tensor], layers: slice) -> None:
        """Changes the modules of `layers` in place: their weights become views of (O, I) each."""
        for member in self.members:
            for weight, module in zip(weights, member.modules[layers], strict=True):
                view = weight[member.rows]  # (O of the member, I)
                view.copy_(weight_of(module))
                weight_of(module).data = view

    def find_bound(self) -> Tensor | None:
        """Return the weights as one tensor (L, O, I) if an earlier step has bound them so.

        The next wave of a sweep then needs no second copy of the base beside the first.
        """
        first = weight_of(self.members[0].modules[0])
        start, size = first.data_ptr(), first.element_size() * self.inputs
        for member in self.members:
            for layer, module in enumerate(member.modules):
                weight = weight_of(module)
                address = start + (layer * self.outputs + member.rows.start) * size
                if weight.data_ptr() != address or weight.dtype is not self.dtype:
                    return None
        whole = self.n_layers * self.outputs * size  # bytes
        # Neighbours by chance, of storages of their own, are no tensor.
        if start + whole > first.untyped_storage().data_ptr() + first.untyped_storage().nbytes():
            return None
        return first.detach().as_strided(
            (self.n_layers, self.outputs, self.inputs), (self.outputs * self.inputs, self.inputs, 1)
        )

    def _bind_biases(self) -> None:
        modules = [m.modules[0] for m in self.members]
        if all(bias_of(module) is None for module in modules):
            return
        # Zeros for members without a bias: one addmm for all.
        self.bias = self.empty(self.n_layers, self.outputs).zero_()  # (L, O)
        for member in self.members:
            for layer, module in enumerate(member.modules):
                bias = bias_of(module)
                if bias is not None:
                    view = self.bias[layer, member.rows]
                    view.copy_(bias)
                    bias.data = view

    def empty(self, *shape: int) -> Tensor:
        """Return an uninitialised tensor of the compute dtype, on the projection's device."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def matmul(self, layer: int, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """Changes `out` (N, O) in place: x (N, K) times `weight` (O, K), and the bias."""
        if self.bias is None:
            torch.mm(x, weight.T, out=out)  # into a buffer: a captured step allocates nothing
        else:
            torch.addmm(self.bias[layer], x, weight.T, out=out)

    def fill(self) -> None:
        """Put the parameters' values into their slots, once these are allocated."""

    def refresh(self) -> None:
        """Bring the tensors that matmuls read up to date with the slots."""

    def fp8_inputs(self, x: Tensor) -> Fp8Rows | None:
        """Return where the operation that computes `x` (N, I) also writes it in fp8, if it does."""
        return None

    def fp8_gradients(self, layer: int, dy: Tensor) -> Fp8Rows | None:
        """Return where the operation that computes `dy` (N, O) also writes it in fp8."""
        return None

    def forward(self, layer: int, x: Tensor, out: Tensor) -> None:
        """Changes `out` (N, O) in place: the outputs for `x` (N, I + extra)."""
        raise NotImplementedError

    def backward(self, layer: int, dy: Tensor, dx: Tensor | None) -> None:
        """Changes `dx` (N, I) in place, from `dy` (N, O + extra); None: nothing needs it."""
        raise NotImplementedError

    def accumulate_gradients(self, layers: slice, x: Tensor, dy: Tensor, *, first: bool) -> None:
        """Add the weight gradients of `layers` to their slots.

        `x` is (layers, N, I + extra), `dy` (layers, N, O + extra), as forward and backward left
        them. `first`: of the step's micro-batches, so that gradients replace what is there.
        """


class FrozenProjection(Projection):
    """No linear of it trains."""

    def __init__(self, blocks: Sequence[Sequence[nn.Module]], dtype: torch.dtype) -> None:
        super().__init__(blocks, dtype)
        self.weights: list[Tensor] = []
        self.bind_base()

    def bind_base(self) -> None:
        """Changes the modules in place: their weights become views of `weights`."""
        for layer in range(self.n_layers):  # one by one, so that a large base is never there twice
            self.weights.append(self.empty(self.outputs, self.inputs))
            self.bind_layers(self.weights[layer:], slice(layer, layer + 1))
        self._bind_biases()

    def forward(self, layer: int, x: Tensor, out: Tensor) -> None:
        self.matmul(layer, x, self.weights[layer], out)

    def backward(self, layer: int, dy: Tensor, dx: Tensor | None) -> None:
        if dx is not None:
            torch.mm(dy, self.weights[layer], out=dx)


class FullProjection(Projection):
    """All of it trains: fp32 values in the slot, and a copy in the compute dtype for matmuls."""

    def __init__(
        self, blocks: Sequence[Sequence[nn.Module]], flat: FlatParameters, dtype: torch.dtype
    ) -> None:
        super().__init__(blocks, dtype)
        self.slot = flat.reserve((self.n_layers, self.outputs, self.inputs), decays=True)
        self.bias_slot: Slot | None = None
        if any(bias_of(member.modules[0]) is not None for member in self.members):
            self.bias_slot = flat.reserve((self.n_layers, self.outputs), decays=False)

    def fill(self) -> None:
        self.bind(self.slot.values)
        self.weight = self.slot.values.to(self.dtype)  # the values themselves where dtypes agree
        self.refresh()

    def _bind_biases(self) -> None:
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
        self.matmul(layer, x, self.weight[layer], out)

    def backward(self, layer: int, dy: Tensor, dx: Tensor | None) -> None:
        if dx is not None:
            torch.mm(dy, self.weight[layer], out=dx)

    def accumulate_gradients(self, layers: slice, x: Tensor, dy: Tensor, *, first: bool) -> None:
        # One block at a time: batched, the gradients would be there a second time in the compute
        # dtype before they are added in fp32.
        for index, layer in enumerate(range(self.n_layers)[layers]):
            gradient = dy[index].T @ x[index]  # (O, I)
            accumulate(self.slot.gradients[layer], gradient, first=first)
        if self.bias_slot is not None:
            # Not rounded to the compute dtype before it is added.
            total = dy.sum(1, dtype=self.bias_slot.values.dtype)  # (layers, O)
            accumulate(self.bias_slot.gradients[layers], total, first=first)


def weight_of(module: nn.Module) -> nn.Parameter:
    """Return the weight (O, I) of a linear, with LoRA or without."""
    return cast(nn.Parameter, module.weight)


def bias_of(module: nn.Module) -> nn.Parameter | None:
    """Return the bias (O,) of a linear, if it has one."""
    return cast("nn.Parameter | None", module.bias)


def _sizes(module: nn.Module) -> tuple[int, int]:
    # Not of the weight's shape: packed, it has fewer columns.
    return cast(int, module.out_features), cast(int, module.in_features)
