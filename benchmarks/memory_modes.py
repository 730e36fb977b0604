"""Planned and measured GPU memory of each activation-checkpointing mode, 135M to 70B.

    python benchmarks/memory_modes.py --out benchmarks/results/memory_modes_h200.jsonl
    python benchmarks/memory_modes.py --only 70B-1x4096:auto 70B-1x4096:full

Random weights, rank 16 on all linears, 70B with an fp8 base; each row in its own process, as
`lora finetune` does it: planned, built, fitted to what is free beside the weights, evaluated,
trained for three steps, evaluated again. `MODE@GB` plans for so many GB. Prints JSON lines; in GB
(10⁹ bytes):

    free_gb              before anything was allocated
    planned_gb           by the plan of the mode that trained, evaluation included
    peak_gb              of live tensors, as the plan counts
    reserved_gb          of the allocator: live tensors, cached blocks and pieces that nothing fits
    fragments_gb         reserved and not live, with weights and optimizer in place and caches given
                         back: what FRAGMENTED_WEIGHTS_FRACTION leaves room for
    outside_gb           used on the device outside the allocator, after the steps
    outside_growth_gb    of that, since weights and optimizer were in place: with cached pieces of
                         the graphs' pool, what CAPTURE_BYTES leaves room for

`ran_out` has the modes that `auto` tried before; `failed` what a mode that was named ended with.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from devices.rows import print_row
from one_gpu.cases import CASES, RANK, Shape
from one_gpu.models import build_empty, build_model, build_stream

from lora.adapters.apply import apply_lora
from lora.config import BaseWeights, LoRAConfig, MemoryConfig, TrainConfig
from lora.device import available_bytes, choose_device, free_bytes
from lora.fast.memory.plan import PlanInputs
from lora.fast.memory.planner import MemoryPlanner
from lora.fast.runner import FastStepRunner
from lora.finetune.memory import ChosenMemory

GB = 1e9
N_STEPS = 3
MODES_OF = {
    "135M-4x512": ("auto", "full"),
    "1B-4x2048": ("auto", "cheap", "full"),
    "8B-4x2048": ("auto", "cheap", "full", "full+offload"),
    # A plan for 142.1 GB did not fit when nothing was left free for fragments.
    "70B-1x4096": ("auto", "full", "full+offload", "auto@142.1", "cheap@142.1"),
}
ROWS = [f"{case}:{mode}" for case, modes in MODES_OF.items() for mode in modes]


def plan(shape: Shape, mode: str, base: BaseWeights) -> ChosenMemory:
    """Return the plan of a run on this GPU, made as `lora finetune` makes it."""
    lora = LoRAConfig(rank=RANK, alpha=2.0 * RANK, init_seed=0)
    inputs = PlanInputs(
        build_empty(shape).config, lora, shape.rows, shape.tokens, "cuda", torch.bfloat16,
        packed=False, base=base,
    )  # fmt: skip
    planner, free = MemoryPlanner(inputs), available_bytes("cuda")
    assert free is not None
    mode, _, gb = mode.partition("@")
    budget = float(gb) if gb else planner.usable_bytes(free) / GB
    memory = MemoryConfig(mode, budget)  # type: ignore[arg-type]
    return ChosenMemory(planner, planner.plan(memory=memory), may_change=mode == "auto")


def outside_bytes() -> int:
    """Return what the device holds outside torch's allocator."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def run_child(case: str, mode: str) -> dict[str, Any]:
    """Return the row of one case and mode, measured in this process."""
    shape, choice = CASES[case], choose_device("cuda")
    base = BaseWeights("fp8" if case.startswith("70B") else "auto")
    free, messages = available_bytes("cuda") or 0, list[str]()
    chosen = plan(shape, mode, base)
    first, chosen.on_message = chosen.plan, messages.append
    model = build_model(shape, torch.bfloat16, base=base)
    apply_lora(model, LoRAConfig(rank=RANK, alpha=2.0 * RANK, init_seed=0))
    config = TrainConfig(steps=N_STEPS, batch_size=shape.rows)
    runner = FastStepRunner(
        model, choice, config, checkpointing=first.checkpointing, leaner=chosen.take_leaner
    )
    beside = free_bytes(choice.device)
    fragments = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    outside = outside_bytes()
    torch.cuda.reset_peak_memory_stats()
    stored = chosen.refit(beside)
    if stored is not None:
        runner.step.checkpointing = stored
    row: dict[str, Any] = {
        "case": case, "mode": mode, "hardware": f"one {torch.cuda.get_device_name()}",
        "torch": torch.__version__, "free_gb": free, "first_planned_gb": first.total,
        "free_beside_weights_gb": beside, "fragments_gb": fragments,
    }  # fmt: skip
    try:
        row |= train(runner, shape, choice.device)
    except torch.OutOfMemoryError as error:
        row["failed"] = str(error).splitlines()[0][:300]
    last = chosen.plan
    row |= {
        "planned_gb": last.total, "reason": last.reason, "ran_out": chosen.ran_out,
        "messages": messages, "peak_gb": torch.cuda.max_memory_allocated(),
        "reserved_gb": torch.cuda.max_memory_reserved(), "outside_gb": outside_bytes(),
        "outside_growth_gb": outside_bytes() - outside,
    }  # fmt: skip
    return {k: round(v / GB, 2) if k.endswith("_gb") else v for k, v in row.items()}


def train(runner: FastStepRunner, shape: Shape, device: torch.device) -> dict[str, Any]:
    """Evaluate, take a few steps, and evaluate beside what they hold."""
    stream = build_stream(shape, "cpu", packed=False)
    losses, seconds = [], []
    runner.evaluate([next(stream).to(device)])
    for step in range(1, N_STEPS + 1):
        begun_s = time.perf_counter()
        runner.launch(step, [next(stream)], [1e-4])
        losses += [round(outcome.losses[0], 4) for outcome in runner.finished(wait=True)]
        seconds.append(round(time.perf_counter() - begun_s, 2))
    runner.evaluate([next(stream).to(device)])
    return {"losses": losses, "step_s": seconds}


def measure(name: str, limit_s: float) -> dict[str, Any]:
    """Return the row of one case and mode, run in a subprocess."""
    command, begun_s = [sys.executable, __file__, "--child", name], time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"row": name, "failed": f"more than {limit_s:g} s"}
    if done.returncode:
        return {"row": name, "failed": (done.stderr.strip().splitlines() or ["?"])[-1][:300]}
    row = json.loads(done.stdout.splitlines()[-1])
    return {**row, "process_s": round(time.perf_counter() - begun_s, 1)}


def main() -> None:
    """Measure all rows or some."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--limit-s", type=float, default=100, help="of a row")
    parser.add_argument("--out", type=Path, help="also append the lines to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(run_child(*arguments.child.split(":"))))
        return
    # The largest first: those are what the numbers are for.
    for name in sorted(arguments.only, key=lambda name: -CASES[name.split(":")[0]].parameters):
        print_row(measure(name, arguments.limit_s), arguments.out)


if __name__ == "__main__":
    main()
