"""A matmul that unpacks its nf4 weight itself, beside unpacking first and then cuBLAS's matmul.

    python benchmarks/nf4_matmul.py [--out FILE]     on a GPU

Prints microseconds by the number of tokens, at the widths of 8B's up_proj and down_proj: of the
unpacking alone, of the bf16 matmul alone, of both, and of the fused kernel with the best of TILES.
The step unpacks first (lora/fast/weights/unpacked.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from devices.rows import main_on_a_gpu
from nf4_unpack import device_microseconds
from torch import Tensor

from lora.kernels.nf4 import Nf4Tensor, nf4_pairs, nf4_scales, quantise_nf4
from lora.kernels.step.jit import jit, tl
from lora.kernels.unpack.nf4 import unpack_nf4_triton

SHAPES = {"8B up_proj": (14336, 4096), "8B down_proj": (4096, 14336)}
TOKENS = (16, 256, 2048, 8192)
TILES = [
    (128, 128, 8, 3),
    (128, 256, 8, 3),
    (256, 128, 8, 3),
    (64, 128, 4, 4),
    (64, 64, 4, 4),
    (16, 128, 4, 4),
    (16, 64, 4, 4),
]
"""Tokens and outputs of a tile, warps, stages."""
BLOCK = 64


def main() -> int:
    """Print one line for each shape and number of tokens."""
    return main_on_a_gpu(__doc__, _measurements())


def _measurements() -> Iterator[dict[str, Any]]:
    for shape, (outputs, inputs) in SHAPES.items():
        torch.manual_seed(0)
        kind: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        weight = torch.randn(outputs, inputs, **kind) * 0.02
        packed = quantise_nf4(weight, BLOCK)
        scales = nf4_scales(packed).view(outputs, inputs // BLOCK)
        for tokens in TOKENS:
            x = torch.randn(tokens, inputs, **kind)
            out, fused = torch.empty(tokens, outputs, **kind), torch.empty(tokens, outputs, **kind)

            def unpack(packed: Nf4Tensor = packed, weight: Tensor = weight) -> None:
                unpack_nf4_triton(packed, weight)

            def matmul(x: Tensor = x, weight: Tensor = weight, out: Tensor = out) -> None:
                torch.mm(x, weight.T, out=out)

            found = {"unpack": device_microseconds(unpack), "matmul": device_microseconds(matmul)}
            found["both"] = device_microseconds(lambda one=unpack, two=matmul: (one(), two()))
            best, tile = min(_fused_times(x, packed, scales, fused))
            yield {
                "shape": shape,
                "tokens": tokens,
                **{f"{name}_us": round(us, 1) for name, us in found.items()},
                "fused_us": round(best, 1),
                "tile": tile,
                "apart": round(float((fused - out).norm() / out.norm()), 5),
            }


def _fused_times(
    x: Tensor, packed: Nf4Tensor, scales: Tensor, out: Tensor
) -> Iterator[tuple[float, tuple[int, ...]]]:
    for tile in TILES:
        if tile[0] <= max(16, len(x)):
            yield device_microseconds(fused_matmul(x, packed, scales, out, tile)), tile


def fused_matmul(
    x: Tensor, packed: Nf4Tensor, scales: Tensor, out: Tensor, tile: tuple[int, ...]
) -> Callable[[], None]:
    """Return a call that writes x Wᵀ into `out` (N, O); `scales` are (O, I / BLOCK), fp32."""
    rows, columns, warps, stages = tile
    (tokens, inputs), outputs = x.shape, out.shape[1]
    grid = (-(-tokens // rows) * (outputs // columns),)

    def call() -> None:
        _fused_kernel[grid](
            x, packed.codes, scales, nf4_pairs(packed.codes), out, tokens, outputs, inputs,
            ROWS=rows, COLUMNS=columns, BLOCK=BLOCK, STEPS=inputs // BLOCK,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip

    return call


@jit
def _fused_kernel(
    x, codes, scales, pairs, out, tokens, outputs, inputs,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One tile of x Wᵀ; a block of W is unpacked between its codes and the tensor cores."""
    n_rows = (tokens + ROWS - 1) // ROWS
    # Programs that follow one another share their columns of W, which the cache then has.
    row = (tl.program_id(0) % n_rows) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) // n_rows) * COLUMNS + tl.arange(0, COLUMNS)
    levels = tl.load(pairs + 2 * tl.arange(0, 16) + 1)
    x_at = x + row.to(tl.int64)[:, None] * inputs + tl.arange(0, BLOCK)[None, :]
    half = tl.arange(0, BLOCK // 2)
    code_at = codes + column.to(tl.int64)[:, None] * (inputs // 2) + half[None, :]
    scale_at = scales + column * (inputs // BLOCK)
    there = row[:, None] < tokens
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in range(STEPS):
        own = tl.load(x_at + step * BLOCK, mask=there, other=0.0)
        code = tl.load(code_at + step * (BLOCK // 2)).to(tl.int32)
        code = tl.reshape(tl.interleave(code >> 4, code & 15), [COLUMNS * BLOCK])
        level = tl.reshape(tl.gather(levels, code, 0), [COLUMNS, BLOCK])
        weight = (level * tl.load(scale_at + step)[:, None]).to(x.dtype.element_ty)
        total = tl.dot(own, tl.trans(weight), total)
    out_at = out + row.to(tl.int64)[:, None] * outputs + column[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=there)


if __name__ == "__main__":
    sys.exit(main())
