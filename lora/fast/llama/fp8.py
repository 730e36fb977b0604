"""Projections whose frozen weights are in fp8, and the scratch rows in fp8 that they multiply.

What differs from the textbook: the scales of W's rows, which are its outputs, are multiplied into
dy before dy is rounded, so that forward and backward read the same codes: dx = (dy · s) codes. The
device's GEMM wants both factors with the summed side contiguous, so the codes are transposed before
each matmul of the backward pass; a second copy of all of them would save one hundredth of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lora.decoder.quantised.fp8 import Fp8Weight
from lora.fast.llama.buffers import Buffers
from lora.fast.weights.adapted import DropoutMasks, SeparateLoRAProjection, has_lora
from lora.fast.weights.flat import FlatParameters
from lora.fast.weights.projections import Projection
from lora.kernels.step.fp8 import Fp8Rows
from lora.kernels.step.ops import Ops


class Fp8ScratchRows:
    """One set of fp8 rows, between the operation that writes them and the matmul that reads them.

    A norm or SwiGLU rounds its output while it still has it in registers; the matmul recognises
    those rows by their address. Rows that nobody has written are quantised when they are read.
    """

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes, self.scales = codes, scales  # flat; (N, 1)
        self._address, self._stride, self._shape = 0, 0, (0, 0)
        """Of the rows that were rounded: their first byte, and how they lie."""
        self._n_unread = 0
        """How many of the rows no matmul has read yet."""

    def reserve(self, x: Tensor, factors: Tensor | None = None) -> Fp8Rows:
        """Return scratch for the rows of `x` (N, W), which whoever computes `x` fills."""
        self._address, self._stride = x.data_ptr(), x.stride(0)
        self._shape = len(x), x.shape[1]
        self._n_unread = len(x)
        return self._rows(slice(0, len(x)), x.shape[1], factors)

    def quantised(self, x: Tensor, ops: Ops, factors: Tensor | None = None) -> Fp8Rows:
        """Return the rows of `x` (N, W) in fp8: those written with it, once, or rounded now.

        `x` may be a chunk of the rows that were written together.
        """
        start = self._find(x)
        if start is None:
            ops.quantise_rows(x, self.reserve(x, factors))
            start = 0
        # Counted down, because the same address holds other values in the next block.
        self._n_unread -= len(x)
        return self._rows(slice(start, start + len(x)), x.shape[1], factors)

    def _find(self, x: Tensor) -> int | None:
        rows, width = self._shape
        if not self._n_unread or x.shape[1] != width or x.stride(0) != self._stride:
            return None
        start = (x.data_ptr() - self._address) // (x.stride(0) * x.element_size())
        return start if 0 <= start <= rows - len(x) else None

    def _rows(self, part: slice, width: int, factors: Tensor | None) -> Fp8Rows:
        codes = self.codes[part.start * width : part.stop * width].view(-1, width)
        return Fp8Rows(codes, self.scales[part], factors)


class Fp8Buffers:
    """What the projections of one network share: `ops` and the scratch of one step."""

    def __init__(self, ops: Ops) -> None:
        self.ops = ops
        self.inputs: dict[Projection, Fp8ScratchRows] = {}
        self.gradients: dict[Projection, Fp8ScratchRows] = {}
        self.transposed = self.ones = torch.empty(0)

    def release(self) -> None:
        """Drop the tensors of a former step."""
        self.inputs, self.gradients = {}, {}
        self.transposed = self.ones = torch.empty(0)

    def allocate(
        self, buffers: Buffers, projections: tuple[Projection, Projection, Projection, Projection]
    ) -> None:
        """Changes `buffers` in place: adds the scratch of fp8 matmuls.

        `projections` are q/k/v, the output's, gate/up and down. A feed-forward may take its tokens
        in chunks, so what has its width is as long as a chunk.
        """
        qkv, output, gate_up, down = projections
        n, chunk = buffers.n_tokens, max(one.stop - one.start for one in buffers.chunks)
        sizes = (
            n * max(qkv.inputs, output.inputs),
            chunk * down.inputs,
            n * down.outputs,
            max(n * qkv.outputs, chunk * gate_up.outputs),
        )
        largest = max(one.inputs * one.outputs for one in projections)
        widest = max(one.inputs for one in projections)
        buffers.add_fp8(sum(sizes), widest, largest, self.ops.fp8_dtype)
        scratch = zip(buffers.fp8_codes.split(sizes), buffers.fp8_scales, strict=True)
        rows = [Fp8ScratchRows(codes, scales) for codes, scales in scratch]
        # Projections share a set where one's rows have been read before the other's are written.
        # Forward: q/k/v, output and gate/up in turn, while down's rows come in chunks in between.
        # Backward: of down's and output's dy (C wide) and gate/up's and q/k/v's, by turns.
        self.inputs = {qkv: rows[0], output: rows[0], gate_up: rows[0], down: rows[1]}
        self.gradients = {qkv: rows[3], output: rows[2], gate_up: rows[3], down: rows[2]}
        self.transposed, self.ones = buffers.transposed_codes, buffers.unit_scales


class Fp8BaseProjection(Projection):
    """A base in fp8, its codes (O, I) by block; subclasses say whether LoRA is beside it."""

    fp8: Fp8Buffers

    def bind_base(self) -> None:
        """Changes the modules in place: their codes and scales become views, a block at a time."""
        kind = weight_codes(self.members[0].modules[0]).dtype
        like = torch.empty(0, dtype=kind, device=self.device)
        self.weights: list[Tensor] = []
        for layer in range(self.n_layers):  # so that a large base is never there twice
            self.weights.append(like.new_empty(self.outputs, self.inputs))
            self.bind_layers(self.weights[layer:], slice(layer, layer + 1))
        self._bind_biases()
        self.scales = torch.empty(
            self.n_layers, self.outputs, 1, dtype=torch.float32, device=self.device
        )  # (L, O, 1)
        for member in self.members:
            for layer, module in enumerate(member.modules):
                view = self.scales[layer, member.rows]  # (O of the member, 1)
                view.copy_(cast(Fp8Weight, module).weight_scale)
                cast(Fp8Weight, module).weight_scale = view

    def fp8_inputs(self, x: Tensor) -> Fp8Rows | None:
        return self.fp8.inputs[self].reserve(x)

    def fp8_gradients(self, layer: int, dy: Tensor) -> Fp8Rows | None:
        return self.fp8.gradients[self].reserve(dy, self.scales[layer].squeeze(1))

    def base_forward(self, layer: int, x: Tensor, out: Tensor) -> None:
        """Changes `out` (N, O) in place: x Wᵀ and the bias, for x (N, I)."""
        rows = self.fp8.inputs[self].quantised(x, self.fp8.ops)
        bias = None if self.bias is None else self.bias[layer]
        scales = self.scales[layer].T  # (1, O)
        self.fp8.ops.scaled_matmul(rows, self.weights[layer], scales, bias, out)

    def base_backward(self, layer: int, dy: Tensor, dx: Tensor) -> None:
        """Changes `dx` (N, I) in place: dy W, for dy (N, O)."""
        ops = self.fp8.ops
        rows = self.fp8.gradients[self].quantised(dy, ops, self.scales[layer].squeeze(1))
        size = self.inputs * self.outputs
        transposed = self.fp8.transposed[:size].view(self.inputs, self.outputs)  # (I, O)
        ops.transpose_codes(self.weights[layer], transposed)
        # The scales of W are in dy's rows already: those of the transposed codes are ones.
        ops.scaled_matmul(rows, transposed, self.fp8.ones[:, : self.inputs], None, dx)


class Fp8Projection(Fp8BaseProjection, SeparateLoRAProjection):
    """LoRA in the compute dtype, beside weights in fp8."""

    def __init__(
        self,
        blocks: Sequence[Sequence[nn.Module]],
        flat: FlatParameters,
        dtype: torch.dtype,
        ops: Ops,
        masks: DropoutMasks | None,
        fp8: Fp8Buffers,
    ) -> None:
        self.fp8 = fp8
        super().__init__(blocks, flat, dtype, ops, masks)


class FrozenFp8Projection(Fp8BaseProjection):
    """No linear of it trains."""

    def __init__(
        self, blocks: Sequence[Sequence[nn.Module]], dtype: torch.dtype, fp8: Fp8Buffers
    ) -> None:
        super().__init__(blocks, dtype)
        self.fp8 = fp8
        self.bind_base()

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
    fp8: Fp8Buffers,
) -> Projection:
    """Return the projection of fp8 linears that read the same input, given by block."""
    if has_lora(blocks):
        return Fp8Projection(blocks, flat, dtype, ops, masks, fp8)
    return FrozenFp8Projection(blocks, dtype, fp8)


def weight_codes(module: nn.Module) -> Tensor:
    """Return the codes (O, I) of an fp8 linear."""
    return cast(Fp8Weight, module).weight
