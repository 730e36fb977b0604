"""One training step on a GPU: ours against the peers, each in its own process.

    python benchmarks/gpu_step.py                              # all cases and variants, minutes
    python benchmarks/gpu_step.py --cases 135M-4x512 --variants ours_lora peft
    python benchmarks/gpu_step.py --cases 8B-4x2048 --variants ours_lora_cheap --limit-s 60
    python benchmarks/gpu_step.py --cells 8B-4x2048:ours_lora_nf4 8B-4x2048:peft_bnb_liger
    python benchmarks/gpu_step.py --out benchmarks/results/gpu_step_h200.jsonl
    python benchmarks/gpu_step.py --dry-run                    # tiny shapes on a CPU: does it run?

Random Llama-shaped weights in bf16, rank 16 on all linears, AdamW. "Ours" goes through the trainer
and the real loader; `packed` variants read packed sequences, all others the same batch in every
step. Prints JSON lines. step_ms is the median of steps after the warm-up, peak_gb (10⁹ bytes) the
allocator's peak, build_peak_gb the same while the model was built, start_s the time from building
the step to the end of the first one, its compilation included (for sequences of 32,768 tokens and
more, which have no graph, nearly to the end of the second), planned_gb what
`lora.fast.memory.fast_step` planned. model_tflops counts the matmuls with weights: forward,
backward and, where weights train, their gradients; neither attention nor recomputation. `doubts`
says what is wrong with a row: a loss that is not finite or did not fall, a base that is not packed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from devices.rows import print_row
from gpu_peers import PEERS, PeerMissing
from gpu_qlora import QLORA_PEERS
from one_gpu.cases import BASES, CASES, OURS, RANK, TINY
from one_gpu.ours import time_ours

VARIANTS = (*OURS, *PEERS, *QLORA_PEERS)


def measure_ceiling() -> float:
    """Return the TFLOP/s of a large bf16 GEMM on random data."""
    size = 8192
    x, y = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16).unbind()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(5):
        x @ y
    begin.record()
    for _ in range(30):
        x @ y
    end.record()
    torch.cuda.synchronize()
    return 30 * 2 * size**3 / (begin.elapsed_time(end) * 1e-3) / 1e12


def doubts_about(row: dict[str, Any], variant: str) -> list[str]:
    """Return what is wrong with a row of measurements."""
    found = []
    first, last = row["first_and_last_loss"]
    if not math.isfinite(first + last):
        found.append("the loss is not finite")
    elif last >= first and not variant.endswith("packed"):
        found.append("the loss of the same batch did not fall")
    is_packed = any(name in variant for name in (*BASES, "bnb"))
    if is_packed != bool(row.get("packed_linears")):
        found.append(f"packed linears: {row.get('packed_linears')}")
    return found


def run_child(case: str, variant: str, *, dry: bool = False) -> dict[str, Any]:
    """Return the row of one case and variant, measured in this process.

    A dry run is one of the same code on a CPU, of tiny sizes.
    """
    shape = CASES[case]
    if dry:
        shape = replace(shape, **TINY, rows=min(shape.rows, 2), device="cpu")
    if variant in OURS:
        found = time_ours(shape, variant)
    else:
        found = (PEERS | QLORA_PEERS)[variant](shape, RANK)
    found = {key: round(v, 2) if isinstance(v, float) else v for key, v in found.items()}
    found["doubts"] = doubts_about(found, variant)
    if dry:
        return {"case": case, "variant": variant, "hardware": "a dry run on a CPU", **found}
    ceiling = measure_ceiling()
    tokens = shape.rows * shape.tokens
    trains_all = variant == "ours_full" or variant.startswith("full_")
    flops = (6 if trains_all else 4) * shape.parameters * tokens
    tflops = flops / (found["step_ms"] * 1e-3) / 1e12
    packages = ["torch", "triton", "transformers"]
    packages += [] if variant in OURS else ["peft", "bitsandbytes", "liger-kernel"]
    return {
        "case": case,
        "variant": variant,
        "hardware": f"one {torch.cuda.get_device_name()}",
        "versions": {name: version(name) for name in packages if find_spec(_module(name))},
        **found,
        "tokens_per_s": round(tokens / (found["step_ms"] * 1e-3)),
        "model_tflops": round(tflops, 1),
        "share_of_ceiling": round(tflops / ceiling, 3),
    }


def _module(package: str) -> str:
    return package.replace("-", "_")


def main() -> int:
    """Measure each case and variant in its own process; print JSON lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--cells", nargs="+", metavar="CASE:VARIANT", help="these, in this order")
    parser.add_argument("--out", type=Path, help="also append the lines to this file")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--limit-s", type=float, help="seconds after which a case counts as failed")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    known = {f"{case}:{variant}" for case in CASES for variant in VARIANTS}
    if unknown := [cell for cell in arguments.cells or () if cell not in known]:
        parser.error(f"unknown cells: {', '.join(unknown)}")
    if arguments.child:
        return answer(arguments.cases[0], arguments.variants[0], dry=arguments.dry_run)
    cells = arguments.cells or [
        f"{case}:{variant}" for case in arguments.cases for variant in arguments.variants
    ]
    for row in measure_cells(cells, arguments.limit_s, dry=arguments.dry_run):
        print_row(row, arguments.out)
    return 0


def answer(case: str, variant: str, *, dry: bool) -> int:
    """Measure in this process, a child, once its parent says so; return the exit status."""
    get_ready(variant)
    if not sys.stdin.readline():  # comes when the cell before this one has been measured
        return 1
    try:
        row = run_child(case, variant, dry=dry)
    except PeerMissing as missing:
        row = {"case": case, "variant": variant, "skipped": str(missing)}
    print_row(row, None)
    return 0


def get_ready(variant: str) -> None:
    """Import what a variant needs and open the GPU, which takes as long as many a measurement."""
    if variant not in OURS:
        for name in ("transformers.models.llama.modeling_llama", "peft", "bitsandbytes"):
            with suppress(ImportError):
                importlib.import_module(name)
    if torch.cuda.is_available():
        torch.cuda.init()


def measure_cells(
    cells: Sequence[str], limit_s: float | None, *, dry: bool
) -> Iterator[dict[str, Any]]:
    """Yield the row of each CASE:VARIANT; the process of the next one gets ready meanwhile."""
    waiting = deque(cells)
    following = _start(waiting.popleft(), dry=dry) if waiting else None
    while following is not None:
        process, cell = following
        following = _start(waiting.popleft(), dry=dry) if waiting else None
        yield _finish(process, cell, limit_s)


def _start(cell: str, *, dry: bool) -> tuple[subprocess.Popen[str], str]:
    case, variant = cell.split(":")
    command = [sys.executable, __file__, "--child", "--cases", case, "--variants", variant]
    command += ["--dry-run"] if dry else []
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True), cell


def _finish(process: subprocess.Popen[str], cell: str, limit_s: float | None) -> dict[str, Any]:
    case, variant = cell.split(":")
    try:
        out, errors = process.communicate("go\n", timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"case": case, "variant": variant, "failed": f"not in {limit_s:.0f} s"}
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        said = errors.strip().splitlines() or ["no output"]
        # The last line may be of a library's cleaning up.
        failed = next((line for line in reversed(said) if "Error" in line), said[-1])
        return {"case": case, "variant": variant, "failed": failed[:300]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
