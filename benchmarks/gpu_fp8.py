"""Time of each part of a step over a frozen FP8 base on a GPU, against bf16.

    python benchmarks/gpu_fp8.py --out benchmarks/results/gpu_fp8_h200.jsonl
    python benchmarks/gpu_fp8.py --shapes 1B

For the four projections of an 8B and a 1B model at 8192 tokens: the GEMM in bf16 and in FP8 (one
scale per tensor, row or block; accumulation in the tensor cores' own width or in fp32), quantising
activations in a kernel of its own and fused into the kernel that produces them, LoRA's low-rank
matmuls, and transposing weights. Prints JSON lines: microseconds (the median over groups of calls)
and TFLOP/s or GB/s. Takes half a minute.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from devices.rows import print_row
from torch import Tensor

from lora.kernels.step import norm, swiglu
from lora.kernels.step.fp8 import FP8, Fp8Rows, quantise_rows_triton, transpose_codes_triton

TOKENS, RANK, GROUPS, CALLS = 8192, 16, 5, 6
SHAPES = {  # projection: inputs, outputs, linears with LoRA
    "8B": {
        "qkv": (4096, 6144, 3),
        "output": (4096, 4096, 1),
        "gate_up": (4096, 28672, 2),
        "down": (14336, 4096, 1),
    },
    "1B": {
        "qkv": (2048, 3072, 3),
        "output": (2048, 2048, 1),
        "gate_up": (2048, 16384, 2),
        "down": (8192, 2048, 1),
    },
}


def measure(function: Callable[[], Any]) -> float:
    """Return microseconds per call, the median of a few groups of calls."""
    for _ in range(3):
        function()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(GROUPS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        for _ in range(CALLS):
            function()
        mark.record()
    torch.cuda.synchronize()
    pairs = itertools.pairwise(marks)
    return statistics.median(a.elapsed_time(b) for a, b in pairs) * 1e3 / CALLS


def fp8_rows(rows: int, width: int, *, factors: bool = False) -> Fp8Rows:
    """Return a buffer of FP8 rows, filled with random values."""
    into = Fp8Rows(
        torch.empty(rows, width, dtype=FP8, device="cuda"),
        torch.empty(rows, 1, device="cuda"),
        torch.rand(width, device="cuda") if factors else None,
    )
    quantise_rows_triton(torch.randn(rows, width, device="cuda", dtype=torch.bfloat16), into)
    return into


def gemms(inputs: int, outputs: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the ways to compute x Wᵀ for x (N, I) and W (O, I), by name."""
    x = torch.randn(TOKENS, inputs, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) * 0.02
    out = torch.empty(TOKENS, outputs + 16, device="cuda", dtype=torch.bfloat16)
    whole, beside = out.view(-1)[: TOKENS * outputs].view(TOKENS, outputs), out[:, :outputs]
    yield "bf16", lambda: torch.mm(x, w.T, out=whole)
    rows, weight = fp8_rows(TOKENS, inputs), fp8_rows(outputs, inputs)
    one = torch.ones((), device="cuda")

    def scaled(a: Tensor, b: Tensor, *, fast: bool, into: Tensor | None) -> Callable[[], Any]:
        return lambda: torch._scaled_mm(
            rows.codes, weight.codes.T, a, b,
            out_dtype=torch.bfloat16, use_fast_accum=fast, out=into,
        )  # fmt: skip

    by_row = rows.scales, weight.scales.T
    yield "fp8 a row, fast sums", scaled(*by_row, fast=True, into=whole)
    yield "fp8 a row, fast sums, wider rows of out", scaled(*by_row, fast=True, into=beside)
    yield "fp8 a row, fp32 sums", scaled(*by_row, fast=False, into=whole)
    yield "fp8 a tensor, fast sums", scaled(one, one, fast=True, into=whole)
    if inputs % 128 == 0 and outputs % 128 == 0:
        blocks = inputs // 128
        left = torch.rand(blocks, TOKENS, device="cuda").T  # (N, blocks), columns contiguous
        right = torch.rand(outputs // 128, blocks, device="cuda").T  # (blocks, O / 128)
        yield "fp8 a block", scaled(left, right, fast=False, into=whole)


def low_rank(inputs: int, outputs: int, linears: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield LoRA's low-rank matmuls, forward and backward, by name."""
    width = -(-linears * RANK // 16) * 16
    x = torch.randn(TOKENS, inputs + width, device="cuda", dtype=torch.bfloat16)
    a = torch.randn(width, inputs, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(outputs, width, device="cuda", dtype=torch.bfloat16)
    out = torch.randn(TOKENS, outputs + width, device="cuda", dtype=torch.bfloat16)
    yield "x Aᵀ", lambda: torch.mm(x[:, :inputs], a.T, out=x[:, inputs:])
    yield "y += h Bᵀ", lambda: out[:, :outputs].addmm_(x[:, inputs:], b.T)
    yield "dy B", lambda: torch.mm(out[:, :outputs], b, out=out[:, outputs:])
    yield "dx += dh A", lambda: x[:, :inputs].addmm_(out[:, outputs:], a)
    yield "dA", lambda: out[:, outputs:].T @ x[:, :inputs]
    yield "dB", lambda: out[:, :outputs].T @ x[:, inputs:]


def makers(hidden: int, feed: int, qkv: int) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """Yield the kernels that produce activations, with and without codes, and the bytes moved."""
    draw = {"device": "cuda", "dtype": torch.bfloat16}
    n, c, f = TOKENS, hidden, feed
    x, delta, total, normed = (torch.randn(n, c, **draw) for _ in range(4))
    weight, rstd = torch.ones(c, **draw), torch.ones(n, device="cuda")
    gate_up, activated = torch.randn(n, 2 * f, **draw), torch.randn(n, f, **draw)
    recomputed = torch.empty(n, f, **draw)
    wide = torch.randn(n, qkv, **draw)
    narrow, middle = fp8_rows(n, c, factors=True), fp8_rows(n, f)
    double = fp8_rows(n, 2 * f, factors=True)
    scratch = fp8_rows(n, qkv, factors=True)
    for name, rows in (("", None), (" and codes", narrow)):
        plain = Fp8Rows(narrow.codes, narrow.scales) if rows else None
        more = n * c if rows else 0
        yield (
            f"add_norm{name}",
            8 * n * c + more,
            lambda plain=plain: norm.add_norm_triton(
                x, delta, weight, 1e-5, total, normed, rstd, plain
            ),
        )
        yield (
            f"norm_backward{name}",
            8 * n * c + more,
            lambda rows=rows: norm.norm_backward_triton(
                delta, total, rstd, weight, x, normed, rows
            ),
        )
    for name, rows in (("", None), (" and codes", middle)):
        size = n * f * (6 + (1 if rows else 0))
        yield (
            f"swiglu{name}",
            size,
            lambda rows=rows: swiglu.swiglu_triton(gate_up, activated, rows),
        )
    for name, rows in (("", None), (" and codes", double)):
        size = n * f * (12 + (2 if rows else 0))
        yield (
            f"swiglu_backward{name}",
            size,
            lambda rows=rows: swiglu.swiglu_backward_triton(gate_up, activated, recomputed, rows),
        )
    for width, source, rows in ((c, x, narrow), (f, activated, middle), (2 * f, gate_up, double)):
        yield (
            f"quantise {width}",
            3 * n * width,
            lambda source=source, rows=rows: quantise_rows_triton(source, rows),
        )
    yield f"quantise {qkv}", 3 * n * qkv, lambda: quantise_rows_triton(wide, scratch)


def transposes(inputs: int, outputs: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield ways to transpose a weight's FP8 codes."""
    weight, out = fp8_rows(outputs, inputs).codes, fp8_rows(inputs, outputs).codes
    yield "turned by Triton", lambda: transpose_codes_triton(weight, out)
    yield "turned by torch", lambda: out.view(torch.uint8).copy_(weight.view(torch.uint8).T)


def measure_gemms(name: str) -> Iterator[dict[str, Any]]:
    """Yield the measurements of the matmuls of one model's shapes."""
    for projection, (inputs, outputs, linears) in SHAPES[name].items():
        for way, (i, o) in (("forward", (inputs, outputs)), ("backward", (outputs, inputs))):
            for kind, function in gemms(i, o):
                row = {"model": name, "part": f"{projection} {way}", "kind": kind}
                yield timed(row, function, flops=2 * TOKENS * i * o)
        for kind, function in low_rank(inputs, outputs, linears):
            yield timed({"model": name, "part": f"{projection} LoRA", "kind": kind}, function)
        for kind, function in transposes(inputs, outputs):
            row = {"model": name, "part": projection, "kind": kind}
            yield timed(row, function, n_bytes=2 * inputs * outputs)


def measure_makers(name: str) -> Iterator[dict[str, Any]]:
    """Yield the measurements of the kernels that produce activations."""
    shapes = SHAPES[name]
    hidden, feed, qkv = shapes["output"][0], shapes["down"][0], shapes["qkv"][1]
    for kind, n_bytes, function in makers(hidden, feed, qkv):
        yield timed({"model": name, "part": "rows", "kind": kind}, function, n_bytes=n_bytes)


def timed(
    row: dict[str, Any], function: Callable[[], Any], *, flops: int = 0, n_bytes: int = 0
) -> dict[str, Any]:
    """Return `row` with the measurement, or with the error under "failed"."""
    try:
        us = measure(function)
    except (RuntimeError, ValueError) as error:
        return {**row, "failed": str(error).splitlines()[0][:200]}
    found: dict[str, Any] = {**row, "us": round(us, 1)}
    if flops:
        found["tflops"] = round(flops / us / 1e6, 1)
    if n_bytes:
        found["gb_s"] = round(n_bytes / us / 1e3)
    return found


def main() -> int:
    """Measure the chosen shapes; print JSON lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--out", type=Path, help="also append the lines to this file")
    parser.add_argument(
        "--makers", action="store_true", help="only the kernels that produce activations"
    )
    arguments = parser.parse_args()
    hardware = f"one {torch.cuda.get_device_name()}"
    torch.manual_seed(0)
    for name in arguments.shapes:
        found = () if arguments.makers else measure_gemms(name)
        for row in itertools.chain(found, measure_makers(name)):
            row |= {"hardware": hardware, "torch": torch.__version__}
            print_row(row, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
