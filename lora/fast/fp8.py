"""Projections whose frozen weights are in eight bits, and the rows in eight bits they multiply.

What differs from the textbook: the scales of W's rows, which are its outputs, go into dy before dy
is rounded, so that forward and backward read the same codes: dx = (dy · s) codes. The device wants
both factors of a product with the summed side contiguous, hence the codes turned around, in a
second copy or once more at each product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lora.decoder.quantised import Fp8Weight
from lora.fast.adapted import ApartProjection, Masks
from lora.fast.buffers import Buffers
from lora.fast.flat import FlatParameters
from lora.fast.ops import Ops
from lora.fast.projections import Projection
from lora.kernels.fp8 import CodedRows
from lora.lora_module import LoRALayer


class PassingRows:
    """Rows in eight bits between their maker and the product that reads them, one set at a time."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes, self.scales = codes, scales  # flat; (N, 1)
        self._holds: tuple[int, int] | None = None

    def rows_for(self, x: Tensor, factors: Tensor | None = None) -> CodedRows:
        """Return room for the rows of `x` (N, W), which its maker fills."""
        n, width = x.shape
        self._holds = x.data_ptr(), width
        return CodedRows(self.codes[: n * width].view(n, width), self.scales, factors)

    def rows_of(self, x: Tensor, ops: Ops, factors: Tensor | None = None) -> CodedRows:
        """Return the rows of `x` (N, W): those that its maker left, once, or made now."""
        is_there = self._holds == (x.data_ptr(), x.shape[1])
        rows = self.rows_for(x, factors)
        if not is_there:
            ops.quantise_rows(x, rows)
        self._holds = None
        return rows


class Codes:
    """What the projections of one network share.

    Args:
        ops: how rows are rounded and multiplied.
        two_copies: keep the weights turned around too; otherwise they are turned at each product.
    """

    def __init__(self, ops: Ops, *, two_copies: bool) -> None:
        self.ops, self.two_copies = ops, two_copies
        self.inputs: PassingRows
        self.gradients: PassingRows
        self.turned: Tensor
        self.ones: Tensor

    def allocate(self, kept: Buffers, projections: Sequence[Projection]) -> None:
        """Changes `kept` in place: it gets the tensors that rows pass through."""
        inputs = max(projection.inputs for projection in projections)
        outputs = max(projection.outputs for projection in projections)
        turned = 0
        if not self.two_copies:
            turned = max(projection.inputs * projection.outputs for projection in projections)
        kept.add_codes(inputs, outputs, turned, self.ops.code_type)
        self.inputs = PassingRows(kept.input_codes, kept.input_scales)
        self.gradients = PassingRows(kept.gradient_codes, kept.gradient_scales)
        self.turned, self.ones = kept.turned_codes, kept.unit_scales


class Fp8Weights(Projection):
    """The base's weights (L, O, I) in eight bits; a kind of projection adds how LoRA is beside."""

    codes: Codes

    def place_base(self) -> None:
        """Changes the modules in place: their codes and scales move into two stacks, as views."""
        shape = self.n_layers, self.outputs, self.inputs
        kind = weight_codes(self.members[0].modules[0]).dtype
        self.weights = torch.empty(shape, dtype=kind, device=self.device)
        self.scales = torch.empty(
            self.n_layers, self.outputs, 1, dtype=torch.float32, device=self.device
        )
        self.place(self.weights)
        for member in self.members:
            for layer, module in enumerate(member.modules):
                view = self.scales[layer, member.rows]  # (O of the member, 1)
                view.copy_(cast(Fp8Weight, module).weight_scale)
                cast(Fp8Weight, module).weight_scale = view
        self.turned: Tensor | None = None
        if self.codes.two_copies:
            self.turned = self.weights.new_empty(self.n_layers, self.inputs, self.outputs)
            for weight, out in zip(self.weights, self.turned, strict=True):
                self.codes.ops.turn_codes(weight, out)

    def coded_inputs(self, x: Tensor) -> CodedRows | None:
        return self.codes.inputs.rows_for(x)

    def coded_gradients(self, layer: int, dy: Tensor) -> CodedRows | None:
        return self.codes.gradients.rows_for(dy, self.scales[layer].squeeze(1))

    def multiply_base(self, layer: int, x: Tensor, out: Tensor) -> None:
        """Changes `out` (N, O) in place: x Wᵀ and the bias, for x (N, I)."""
        rows = self.codes.inputs.rows_of(x, self.codes.ops)
        bias = None if self.bias is None else self.bias[layer]
        scales = self.scales[layer].T  # (1, O)
        self.codes.ops.scaled_product(rows, self.weights[layer], scales, bias, out)

    def multiply_back(self, layer: int, dy: Tensor, dx: Tensor) -> None:
        """Changes `dx` (N, I) in place: dy W, for dy (N, O)."""
        ops = self.codes.ops
        rows = self.codes.gradients.rows_of(dy, ops, self.scales[layer].squeeze(1))
        if self.turned is not None:
            turned = self.turned[layer]  # (I, O)
        else:
            turned = self.codes.turned[: self.inputs * self.outputs]
            turned = turned.view(self.inputs, self.outputs)
            ops.turn_codes(self.weights[layer], turned)
        ops.scaled_product(rows, turned, self.codes.ones[:, : self.inputs], None, dx)


class Fp8Projection(Fp8Weights, ApartProjection):
    """LoRA, exact, beside weights in eight bits."""

    def __init__(
        self,
        blocks: Sequence[Sequence[nn.Module]],
        flat: FlatParameters,
        dtype: torch.dtype,
        ops: Ops,
        masks: Masks | None,
        codes: Codes,
    ) -> None:
        self.codes = codes
        super().__init__(blocks, flat, dtype, ops, masks)


class FrozenFp8Projection(Fp8Weights):
    """No linear of it trains."""

    def __init__(
        self, blocks: Sequence[Sequence[nn.Module]], dtype: torch.dtype, codes: Codes
    ) -> None:
        super().__init__(blocks, dtype)
        self.codes = codes
        self.place_base()

    def forward(self, layer: int, x: Tensor, out: Tensor) -> None:
        self.multiply_base(layer, x, out)

    def backward(self, layer: int, dy: Tensor, dx: Tensor | None) -> None:
        if dx is not None:
            self.multiply_back(layer, dy, dx)


def fp8_projection(
    blocks: Sequence[Sequence[nn.Module]],
    flat: FlatParameters,
    dtype: torch.dtype,
    ops: Ops,
    masks: Masks | None,
    codes: Codes,
) -> Projection:
    """Return the projection of linears in eight bits, by block and then by place."""
    if any(isinstance(module, LoRALayer) for part in blocks for module in part):
        return Fp8Projection(blocks, flat, dtype, ops, masks, codes)
    return FrozenFp8Projection(blocks, dtype, codes)


def weight_codes(module: nn.Module) -> Tensor:
    """Return the codes (O, I) of a linear in eight bits."""
    return cast(Fp8Weight, module).weight
