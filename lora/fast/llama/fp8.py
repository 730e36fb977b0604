"""Projections whose frozen weights are in eight bits, and the rows in eight bits they multiply.

What differs from the textbook: the scales of W's rows, which are its outputs, go into dy before dy
is rounded, so that forward and backward read the same codes: dx = (dy · s) codes. The device wants
both factors of a product with the summed side contiguous, so the codes are turned around before
each product on the way back: a second copy of them all would save one part in a hundred of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lora.decoder.quantised import Fp8Weight
from lora.fast.llama.buffers import Buffers
from lora.fast.weights.adapted import DropoutMasks, SeparateLoRAProjection
from lora.fast.weights.flat import FlatParameters
from lora.fast.weights.projections import Projection
from lora.kernels.step.fp8 import Fp8Rows
from lora.kernels.step.ops import Ops
from lora.lora_module import LoRALayer


class Fp8ScratchRows:
    """Rows in eight bits between their maker and the product that reads them, one set at a time."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes, self.scales = codes, scales  # flat; (N, 1)
        self._first, self._stride, self._shape = 0, 0, (0, 0)
        """Where the rows lie that these are, in bytes, and how."""
        self._unread = 0
        """How many of them no product has read yet."""

    def rows_for(self, x: Tensor, factors: Tensor | None = None) -> Fp8Rows:
        """Return room for the rows of `x` (N, W), which its maker fills."""
        self._first, self._stride = x.data_ptr(), x.stride(0)
        self._shape = len(x), x.shape[1]
        self._unread = len(x)
        return self._rows(slice(0, len(x)), x.shape[1], factors)

    def rows_of(self, x: Tensor, ops: Ops, factors: Tensor | None = None) -> Fp8Rows:
        """Return the rows of `x` (N, W): those that its maker left, once, or made now.

        `x` may be some of the rows that were made together.
        """
        start = self._place_of(x)
        if start is None:
            ops.quantise_rows(x, self.rows_for(x, factors))
            start = 0
        self._unread -= len(x)
        return self._rows(slice(start, start + len(x)), x.shape[1], factors)

    def _place_of(self, x: Tensor) -> int | None:
        rows, width = self._shape
        if not self._unread or x.shape[1] != width or x.stride(0) != self._stride:
            return None
        start = (x.data_ptr() - self._first) // (x.stride(0) * x.element_size())
        return start if 0 <= start <= rows - len(x) else None

    def _rows(self, part: slice, width: int, factors: Tensor | None) -> Fp8Rows:
        codes = self.codes[part.start * width : part.stop * width].view(-1, width)
        return Fp8Rows(codes, self.scales[part], factors)


class Fp8Buffers:
    """What the projections of one network share: `ops` and the tensors of one step."""

    def __init__(self, ops: Ops) -> None:
        self.ops = ops
        self.inputs: dict[Projection, Fp8ScratchRows] = {}
        self.gradients: dict[Projection, Fp8ScratchRows] = {}
        self.turned = self.ones = torch.empty(0)

    def release(self) -> None:
        """Let the tensors of a former step go."""
        self.inputs, self.gradients = {}, {}
        self.turned = self.ones = torch.empty(0)

    def allocate(
        self, buffers: Buffers, projections: tuple[Projection, Projection, Projection, Projection]
    ) -> None:
        """Changes `buffers` in place: it gets the tensors that rows pass through.

        `projections` are q/k/v, the output's, gate/up and down. A feed-forward may take its tokens
        in parts, so what is of its width has room of its own.
        """
        qkv, output, gate_up, down = projections
        n, a_part = buffers.n_tokens, max(part.stop - part.start for part in buffers.parts)
        sizes = (
            n * max(qkv.inputs, output.inputs),
            a_part * down.inputs,
            n * down.outputs,
            max(n * qkv.outputs, a_part * gate_up.outputs),
        )
        largest = max(one.inputs * one.outputs for one in projections)
        widest = max(one.inputs for one in projections)
        buffers.add_fp8(sum(sizes), widest, largest, self.ops.fp8_dtype)
        places = zip(buffers.fp8_codes.split(sizes), buffers.fp8_scales, strict=True)
        rows = [Fp8ScratchRows(codes, scales) for codes, scales in places]
        self.inputs = {qkv: rows[0], output: rows[0], gate_up: rows[0], down: rows[1]}
        self.gradients = {qkv: rows[3], output: rows[2], gate_up: rows[3], down: rows[2]}
        self.turned, self.ones = buffers.transposed_codes, buffers.unit_scales


class Fp8BaseProjection(Projection):
    """The base's weights (L, O, I) in eight bits; a kind of projection adds how LoRA is beside."""

    codes: Fp8Buffers

    def place_base(self) -> None:
        """Changes the modules in place: their codes and scales become views, a block at a time."""
        kind = weight_codes(self.members[0].modules[0]).dtype
        like = torch.empty(0, dtype=kind, device=self.device)
        self.weights: list[Tensor] = []
        for layer in range(self.n_layers):
            self.weights.append(like.new_empty(self.outputs, self.inputs))
            self.move(self.weights[layer:], slice(layer, layer + 1))
        self._place_biases()
        self.scales = torch.empty(
            self.n_layers, self.outputs, 1, dtype=torch.float32, device=self.device
        )
        for member in self.members:
            for layer, module in enumerate(member.modules):
                view = self.scales[layer, member.rows]  # (O of the member, 1)
                view.copy_(cast(Fp8Weight, module).weight_scale)
                cast(Fp8Weight, module).weight_scale = view

    def fp8_inputs(self, x: Tensor) -> Fp8Rows | None:
        return self.codes.inputs[self].rows_for(x)

    def fp8_gradients(self, layer: int, dy: Tensor) -> Fp8Rows | None:
        return self.codes.gradients[self].rows_for(dy, self.scales[layer].squeeze(1))

    def base_forward(self, layer: int, x: Tensor, out: Tensor) -> None:
        """Changes `out` (N, O) in place: x Wᵀ and the bias, for x (N, I)."""
        rows = self.codes.inputs[self].rows_of(x, self.codes.ops)
        bias = None if self.bias is None else self.bias[layer]
        scales = self.scales[layer].T  # (1, O)
        self.codes.ops.scaled_matmul(rows, self.weights[layer], scales, bias, out)

    def base_backward(self, layer: int, dy: Tensor, dx: Tensor) -> None:
        """Changes `dx` (N, I) in place: dy W, for dy (N, O)."""
        ops = self.codes.ops
        rows = self.codes.gradients[self].rows_of(dy, ops, self.scales[layer].squeeze(1))
        turned = self.codes.turned[: self.inputs * self.outputs].view(self.inputs, self.outputs)
        ops.transpose_codes(self.weights[layer], turned)
        ops.scaled_matmul(rows, turned, self.codes.ones[:, : self.inputs], None, dx)


class Fp8Projection(Fp8BaseProjection, SeparateLoRAProjection):
    """LoRA, exact, beside weights in eight bits."""

    def __init__(
        self,
        blocks: Sequence[Sequence[nn.Module]],
        flat: FlatParameters,
        dtype: torch.dtype,
        ops: Ops,
        masks: DropoutMasks | None,
        codes: Fp8Buffers,
    ) -> None:
        self.codes = codes
        super().__init__(blocks, flat, dtype, ops, masks)


class FrozenFp8Projection(Fp8BaseProjection):
    """No linear of it trains."""

    def __init__(
        self, blocks: Sequence[Sequence[nn.Module]], dtype: torch.dtype, codes: Fp8Buffers
    ) -> None:
        super().__init__(blocks, dtype)
        self.codes = codes
        self.place_base()

    def forward(self, layer: int, x: Tensor, out: Tensor) -> None:
        self.base_forward(layer, x, out)

    def backward(self, layer: int, dy: Tensor, dx: Tensor | None) -> None:
        if dx is not None:
            self.base_backward(layer, dy, dx)


def fp8_projection(
    blocks: Sequence[Sequence[nn.Module]],
    flat: FlatParameters,
    dtype: torch.dtype,
    ops: Ops,
    masks: DropoutMasks | None,
    codes: Fp8Buffers,
) -> Projection:
    """Return the projection of linears in eight bits, by block and then by place."""
    if any(isinstance(module, LoRALayer) for part in blocks for module in part):
        return Fp8Projection(blocks, flat, dtype, ops, masks, codes)
    return FrozenFp8Projection(blocks, dtype, codes)


def weight_codes(module: nn.Module) -> Tensor:
    """Return the codes (O, I) of a linear in eight bits."""
    return cast(Fp8Weight, module).weight
