"""Unpacking nf4 weights on a GPU: the kernel's bandwidth by its sizes, and other ways to look up.

    python benchmarks/nf4_unpack.py [--out FILE]     on a GPU

Prints the microseconds that one weight takes and the bandwidth, of what is read and written, beside
a copy of as many bytes, and bitsandbytes' kernel where it is installed. VALUES and WARPS in
lora/kernels/unpack/nf4.py say which sizes are used; the kernel there looks levels up in shared
memory, others by selects or in the cache.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from devices.rows import main_on_a_gpu
from torch import Tensor

from lora.kernels.nf4 import (
    GROUP,
    Nf4Tensor,
    dynamic_levels,
    nf4_pairs,
    quantise_nf4,
    unpack_nf4,
)
from lora.kernels.step.jit import jit, tl
from lora.kernels.unpack import nf4

SHAPES = {
    "1B k_proj": (512, 2048),
    "1B up_proj": (8192, 2048),
    "8B q_proj": (4096, 4096),
    "8B up_proj": (14336, 4096),
    "8B down_proj": (4096, 14336),
    "70B up_proj": (28672, 8192),
}
SIZES = [(1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 8), (8192, 16)]
"""Values and warps of a program."""
REPEATS, LORA_COLUMNS = 20, 48
SELECTS, CACHE = 1, 2
"""Other ways to look a level up: by its bits, and from memory, which the cache serves."""


def main() -> int:
    """Print one line for each measurement."""
    return main_on_a_gpu(__doc__, _measurements())


def _measurements() -> Iterator[dict[str, Any]]:
    for shape, (rows, columns) in SHAPES.items():
        torch.manual_seed(0)
        weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
        packed = quantise_nf4(weight)
        # As in the step: LoRA's matrix lies beside W.
        out = torch.empty_like(torch.empty(rows, columns + LORA_COLUMNS), device="cuda").bfloat16()
        out = out[:, :columns]
        expected = torch.empty_like(weight)
        unpack_nf4(packed, expected)
        n_bytes = rows * columns * 2.5
        for way, call in _ways(packed, weight, out):
            out.zero_()
            us = device_microseconds(call)
            equal = torch.equal(out, expected) if way not in ("copy", "bitsandbytes") else None
            yield {
                "shape": shape,
                "way": way,
                "us": round(us, 1),
                "gb_per_s": round(n_bytes / us / 1e3),
                "equal": equal,
            }


def _ways(
    packed: Nf4Tensor, weight: Tensor, out: Tensor
) -> Iterator[tuple[str, Callable[[], Any]]]:
    copied = torch.empty(int(1.25 * weight.numel()), dtype=torch.uint8, device="cuda")
    source = torch.empty_like(copied)
    yield "copy", lambda: copied.copy_(source)
    sizes = nf4.VALUES, nf4.WARPS
    for values, warps in SIZES:
        nf4.VALUES, nf4.WARPS = values, warps
        yield f"kernel {values}/{warps}", lambda: nf4.unpack_nf4_triton(packed, out)
    nf4.VALUES, nf4.WARPS = sizes
    for name, lookup in (("selects", SELECTS), ("cache", CACHE)):
        yield f"{name} 1024/4", _other(packed, out, lookup, 1024, 4)
    if importlib.util.find_spec("bitsandbytes") is not None:
        functional: Any = importlib.import_module("bitsandbytes.functional")
        codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        yield "bitsandbytes", lambda: functional.dequantize_4bit(codes, state)


def _other(
    packed: Nf4Tensor, out: Tensor, lookup: int, values: int, warps: int
) -> Callable[[], None]:
    cell = min(math.gcd(out.shape[1], packed.block), nf4.MAX_CELL)
    n_cells, cells = out.numel() // cell, values // cell

    def call() -> None:
        _other_kernel[(-(-n_cells // cells),)](
            packed.codes, packed.scales, packed.group_scales, packed.offset,
            nf4_pairs(packed.codes), dynamic_levels(packed.codes), out,
            out.stride(0), out.shape[1] // cell, packed.block // cell,
            GROUP=GROUP, CELL=cell, CELLS=cells, LOOKUP=lookup,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip

    return call


@jit
def _selected(code):
    """Return the level of a code, by its bits."""
    b0, b1 = (code & 1) != 0, (code & 2) != 0
    b2, b3 = (code & 4) != 0, (code & 8) != 0
    low = tl.where(
        b2,
        tl.where(
            b1,
            tl.where(b0, 0.0, -0.09105003625154495),
            tl.where(b0, -0.18477343022823334, -0.28444138169288635),
        ),
        tl.where(
            b1,
            tl.where(b0, -0.39491748809814453, -0.5250730514526367),
            tl.where(b0, -0.6961928009986877, -1.0),
        ),
    )
    high = tl.where(
        b2,
        tl.where(
            b1,
            tl.where(b0, 1.0, 0.7229568362236023),
            tl.where(b0, 0.5626170039176941, 0.44070982933044434),
        ),
        tl.where(
            b1,
            tl.where(b0, 0.33791524171829224, 0.24611230194568634),
            tl.where(b0, 0.16093020141124725, 0.07958029955625534),
        ),
    )
    return tl.where(b3, high, low)


@jit
def _other_kernel(
    codes, scales, group_scales, offset, pairs, scale_levels, out,
    out_stride, cells_per_row, cells_per_block,
    GROUP: tl.constexpr, CELL: tl.constexpr, CELLS: tl.constexpr, LOOKUP: tl.constexpr,
):  # fmt: skip
    """The kernel for whole programs and double quantisation, with another lookup."""
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    block = cell // cells_per_block
    code = tl.load(scales + block).to(tl.int32)
    scale = tl.load(scale_levels + code) * tl.load(group_scales + block // GROUP)
    scale += tl.load(offset)
    at = cell.to(tl.int64)[:, None] * (CELL // 2) + tl.arange(0, CELL // 2)[None, :]
    pair = tl.load(codes + at).to(tl.int32)
    if LOOKUP == 1:
        high, low = _selected(pair >> 4), _selected(pair & 15)
    else:
        high = tl.load(pairs + 2 * (pair >> 4) + 1)
        low = tl.load(pairs + 2 * (pair & 15) + 1)
    values = tl.interleave(high * scale[:, None], low * scale[:, None])
    start = out + (cell // cells_per_row).to(tl.int64) * out_stride + (cell % cells_per_row) * CELL
    tl.store(start[:, None] + tl.arange(0, CELL)[None, :], values.to(out.dtype.element_ty))


def device_microseconds(call: Callable[[], Any]) -> float:
    """Return the time of one call on the device, in a graph: launches are not counted."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            call()
    graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * begin.elapsed_time(end) / REPEATS


if __name__ == "__main__":
    sys.exit(main())
