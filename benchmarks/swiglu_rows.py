"""SwiGLU's gradient with fp8 codes beside it: whole rows in registers against chunks of rows.

    python benchmarks/swiglu_rows.py [--out FILE]     on a GPU

Both give the same bits; which one a width takes is MAX_BLOCK_IN_REGISTERS in
lora/kernels/step/swiglu.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from devices.rows import main_on_a_gpu
from torch import Tensor

from lora.kernels.step import swiglu
from lora.kernels.step.fp8 import FP8, Fp8Rows

WIDTHS = {"1B": 8192, "8B": 14336, "70B": 28672}
TOKENS, REPEATS = 4096, 10


def main() -> int:
    """Print one line for each width: milliseconds of both, and whether their results are equal."""
    return main_on_a_gpu(__doc__, _measurements())


def _measurements() -> Iterator[dict[str, Any]]:
    for shape, width in WIDTHS.items():
        whole_ms, whole = _measure(width, max_block=2**20)
        chunks_ms, chunks = _measure(width, max_block=0)
        yield {
            "shape": shape,
            "width": width,
            "tokens": TOKENS,
            "whole_rows_ms": round(whole_ms, 3),
            "chunks_ms": round(chunks_ms, 3),
            "equal": all(map(torch.equal, whole, chunks)),
        }


def _measure(width: int, max_block: int) -> tuple[float, list[Tensor]]:
    """Return the time of one call and what the first one wrote."""
    swiglu.MAX_BLOCK_IN_REGISTERS = max_block
    torch.manual_seed(0)
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    gate_up, dy = torch.randn(TOKENS, 2 * width, **kind), torch.randn(TOKENS, width, **kind)
    out, codes = torch.empty_like(dy), torch.empty(TOKENS, 2 * width, device="cuda", dtype=FP8)
    scales, factors = torch.empty(TOKENS, 1, device="cuda"), torch.rand(2 * width, device="cuda")
    rows = Fp8Rows(codes, scales, factors)
    swiglu.swiglu_backward_triton(gate_up, dy, out, rows)
    found = [tensor.clone() for tensor in (gate_up, out, codes.view(torch.uint8), scales)]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPEATS):
        swiglu.swiglu_backward_triton(gate_up, dy, out, rows)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / REPEATS, found


if __name__ == "__main__":
    sys.exit(main())
