"""Time of a sweep's candidates trained together against one after another, ours and PEFT's.

    python benchmarks/sweep_speed.py --cases S                     # two cores, a minute
    python benchmarks/sweep_speed.py --cases 135M-1x512 1B-1x512 8B-memory
    python benchmarks/sweep_speed.py --cases 1B-4x512 1B-4x2048 --base-dtype nf4
    python benchmarks/sweep_speed.py --out benchmarks/results/sweep_speed_h200.jsonl

Each cell runs in its own process and prints a JSON line. `together` trains K candidates with the
step of `lora sweep`, `one` trains one with the step of `lora finetune`, both with the real loader
and reading every loss; `peft` is PEFT's step for one, whose runs one after another take K times as
long; `one-K` is one run with K times the batch size: the time of K candidates if their adapters
cost no more than one. `--base-dtype nf4` stores the frozen linears so (not PEFT's). Times are
medians. Random Llama-shaped weights, random tokens, rank 16 on all linears (the character GPT: rank
8, embeddings train too). `8B-memory` compares the peak of eight candidates with the plan, and with
the base plus eight times what one candidate adds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from cpu_step import CASES as CHAR_CASES
from cpu_step import char_batch, char_step
from devices.rows import print_row
from gpu_peers import peft
from one_gpu.cases import Shape
from one_gpu.models import build_empty, build_model, build_stream
from sweep_drift import loss_sums

from lora.adapters.apply import apply_lora
from lora.config import BaseDtype, BaseWeights, LoRAConfig, TrainConfig
from lora.device import choose_device, peak_memory_bytes, synchronize
from lora.fast.choose import choose_steps
from lora.fast.memory.fast_step import fast_memory, stacked_memory
from lora.fast.stacked_runner import choose_stacked_runner
from lora.stacked.apply import apply_stacked
from lora.stacked.losses import stack_batches
from lora.stacked.plain_step import PlainStackedRunner
from lora.training.optim import learning_rate_at
from models.bigram_lm_v2 import BigramLanguageModel
from models.bigram_lm_v2_lora import EMBEDDINGS

RANK, WARM_UP, TIMED = 16, 8, 40
AS_IT_IS = BaseWeights()
TOGETHER = (1, 2, 4, 8)
GPU_CASES = {
    "135M-1x512": Shape(576, 30, 9, 3, 1536, 49152, 1, 512),
    "1B-1x512": Shape(2048, 16, 32, 8, 8192, 128256, 1, 512),
    "1B-4x512": Shape(2048, 16, 32, 8, 8192, 128256, 4, 512),
    "1B-4x2048": Shape(2048, 16, 32, 8, 8192, 128256, 4, 2048),
}
SHAPE_8B = Shape(4096, 32, 32, 8, 14336, 128256, 1, 512, tied=False)
CASES = ("S", *GPU_CASES, "8B-memory")


def median_ms(step: Callable[[], None], warm_up: int, timed: int) -> float:
    """Return the median of `timed` calls in milliseconds."""
    seconds = []
    for _ in range(warm_up + timed):
        began_s = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began_s)
    return 1000 * statistics.median(seconds[warm_up:])


def loras(n: int, rank: int = RANK, **settings: Any) -> list[LoRAConfig]:
    """Return the candidates' LoRA settings, each with its own seed."""
    return [LoRAConfig(rank=rank, alpha=2.0 * rank, init_seed=k, **settings) for k in range(n)]


def configs(n: int) -> list[TrainConfig]:
    """Return the candidates' training settings, whose learning rates differ."""
    rates = [1e-4 * (1 + k) for k in range(n)]
    return [TrainConfig(steps=1000, seed=k, learning_rate=r) for k, r in enumerate(rates)]


def gpu_together(
    shape: Shape, n: int, device: str = "cuda", base: BaseWeights = AS_IT_IS
) -> dict[str, Any]:
    """Return the time of a step of `n` candidates, with the sweep's step and loader."""
    choice = choose_device(device)
    model = build_model(shape, choice.compute_dtype, base=base, device=device)
    said: list[str] = []
    stacked = apply_stacked(model, loras(n), range(n))
    candidates = configs(n)
    training = choose_stacked_runner(model, stacked, candidates, choice, on_message=said.append)
    streams = [build_stream(shape, training.batch_device, packed=False) for _ in range(n)]
    losses: list[list[float]] = []
    steps = itertools.count()
    for k, stream in enumerate(streams):  # each its own rows
        stream.load_state_dict({**stream.state_dict(), "row": k})

    def step() -> None:
        done = next(steps)
        rates = [learning_rate_at(done, config) for config in candidates]
        batch = stack_batches([next(stream) for stream in streams])
        training.launch(done + 1, [batch], rates)
        losses.extend(outcome.losses for outcome in training.finished(wait=False))

    began_s = time.perf_counter()
    step()
    synchronize(choice.device)
    start_s = time.perf_counter() - began_s
    found = {
        "step_ms": median_ms(step, WARM_UP, TIMED),
        "start_s": start_s,
        "step": "; ".join(said),
    }
    losses.extend(outcome.losses for outcome in training.finished(wait=True))
    assert not training.failures, training.failures
    peak = peak_memory_bytes(choice.device) / 1e9
    return {**found, "peak_gb": peak, "losses": [round(loss, 3) for loss in losses[-1]]}


def gpu_one(
    shape: Shape, times: int = 1, device: str = "cuda", base: BaseWeights = AS_IT_IS
) -> dict[str, Any]:
    """Return the time of a step of one run, `times` the batch, with finetune's step and loader."""
    shape, choice = replace(shape, rows=times * shape.rows), choose_device(device)
    empty = build_model(shape, choice.compute_dtype, base=base, device=device)
    model = apply_lora(empty, loras(1)[0])
    said: list[str] = []
    steps = choose_steps(model, choice, TrainConfig(steps=1000), on_message=said.append)
    stream, done = build_stream(shape, steps.batch_device, packed=False), 0

    def step() -> None:
        nonlocal done
        done += 1
        steps.launch(done, [next(stream)], [1e-4])
        steps.finished(wait=False)

    found = {"step_ms": median_ms(step, WARM_UP, TIMED), "step": "; ".join(said)}
    return {**found, "peak_gb": peak_memory_bytes(choice.device) / 1e9}


def gpu_peft(shape: Shape) -> dict[str, Any]:
    """Return the time of a step of PEFT."""
    found = peft(shape, RANK)
    return {"step_ms": found["step_ms"], "peak_gb": found["peak_gb"]}


def memory_8b(n: int) -> dict[str, Any]:
    """Return the peak memory of `n` candidates on the 8B shape, and the planned and allowed one."""
    rows, tokens = SHAPE_8B.rows, SHAPE_8B.tokens
    empty = build_empty(SHAPE_8B).bfloat16()
    planned = stacked_memory(empty.config, loras(n), rows, tokens, packed=False).total
    base = 2 * sum(p.numel() for p in empty.parameters())
    adapted: Any = apply_lora(empty, loras(1)[0])
    adds = fast_memory(adapted, rows, tokens, packed=False).total - base
    allowed = base + n * adds
    bytes_of = {"base": base, "one_adds": adds, "allowed": allowed, "planned": planned}
    found = gpu_together(SHAPE_8B, n)
    return {**found, **{f"{name}_gb": value / 1e9 for name, value in bytes_of.items()}}


def cpu_together(n: int) -> dict[str, Any]:
    """Return the time of a step of `n` candidates on the character GPT."""
    case = CHAR_CASES["S"]
    torch.manual_seed(0)
    model = BigramLanguageModel(96, case.width, 4, case.layers, case.tokens)
    adapters = loras(n, rank=case.rank, modules_to_save=EMBEDDINGS)
    stacked = apply_stacked(model, adapters, range(n))
    stacked.stack.batch_size = case.rows

    def loss_fn(model: Any, batch: Any) -> Any:
        return loss_sums(model, batch, n)

    candidates = configs(n)
    training = PlainStackedRunner(model, stacked, loss_fn, candidates, choose_device("cpu", "fp32"))
    inputs, targets = char_batch(case)
    batch = inputs.repeat(n, 1), targets.repeat(n, 1)
    steps = itertools.count()

    def step() -> None:
        done = next(steps)
        rates = [learning_rate_at(done, config) for config in candidates]
        training.launch(done + 1, [batch], rates)
        training.finished(wait=True)

    return {"step_ms": median_ms(step, 50, 300)}


def cpu_one() -> dict[str, Any]:
    """Return the time of a step of one run on the character GPT, as cpu_step.py's `ours`."""
    return {"step_ms": median_ms(char_step(CHAR_CASES["S"], "ours"), 50, 300)}


def cpu_peft() -> dict[str, Any]:
    """Return the time of a step of PEFT on the character GPT."""
    return {"step_ms": median_ms(char_step(CHAR_CASES["S"], "peft"), 50, 300)}


def run_child(case: str, cell: str, base_dtype: str = "auto") -> dict[str, Any]:
    """Return the row of one cell, measured in this process."""
    kind, _, number = cell.partition("-")
    base = BaseWeights(base_dtype)  # type: ignore[arg-type]
    where: dict[str, Any] = {"case": case, "cell": cell}
    where |= {"base_dtype": base_dtype} if base.is_quantised else {}
    if case == "S":
        one = {"one": cpu_one, "peft": cpu_peft}
        found = one[kind]() if kind in one else cpu_together(int(number))
        where |= {"hardware": "two CPU cores", "threads": torch.get_num_threads()}
    elif case == "8B-memory":
        found = memory_8b(int(number))
    else:
        shape = GPU_CASES[case]
        if kind == "one":
            found = gpu_one(shape, int(number or 1), base=base)
        elif kind == "peft":
            found = gpu_peft(shape)
        else:
            found = gpu_together(shape, int(number), base=base)
    if case != "S":
        where["hardware"] = f"one {torch.cuda.get_device_name()}"
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}
    return {**where, "torch": torch.__version__, **rounded}


def cells_of(case: str) -> list[str]:
    """Return the names of a case's cells."""
    if case == "8B-memory":
        return ["together-8"]
    if case in GPU_CASES:
        over_rows = [f"one-{n}" for n in TOGETHER[2:]]
        return ["one", *over_rows, *(f"together-{n}" for n in TOGETHER), "peft"]
    return ["one", *(f"together-{n}" for n in TOGETHER), "peft"]


def speed_ups(rows: list[dict[str, Any]]) -> list[str]:
    """Return the speed-ups of each case, a sentence per number of candidates."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        ms = {r["cell"]: r["step_ms"] for r in rows if r["case"] == case and "step_ms" in r}
        for n in TOGETHER:
            together = ms.get(f"together-{n}")
            if together is None or "one" not in ms:
                continue
            text = f"{case}: {n} together {together:.2f} ms, {together / ms['one']:.2f}x one; "
            text += f"{n * ms['one'] / together:.2f}x faster than one after another"
            if "peft" in ms:
                text += f", {n * ms['peft'] / together:.1f}x faster than PEFT's {n}"
            lines.append(text)
    return lines


def main() -> int:
    """Measure each cell in its own process; print JSON lines, then the speed-ups."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["S"])
    parser.add_argument("--cells", nargs="+", help="only these cells, such as one together-4 peft")
    parser.add_argument("--out", type=Path, help="also append the lines to this file")
    parser.add_argument("--base-dtype", choices=get_args(BaseDtype), default="auto")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        case, cell = arguments.child
        row = run_child(case, cell, arguments.base_dtype)
        print(json.dumps(row), flush=True)
        return 0
    is_plain = arguments.base_dtype == "auto"
    if not is_plain and {"S", "8B-memory"} & set(arguments.cases):
        parser.error("--base-dtype is for the GPU's cases of speed")
    if not is_plain and "peft" in (arguments.cells or ()):
        parser.error("PEFT's QLoRA is measured by gpu_step.py")
    rows = []
    for case in arguments.cases:
        for cell in cells_of(case):
            if arguments.cells and cell not in arguments.cells:
                continue
            if cell == "peft" and not is_plain:
                continue  # its QLoRA is measured by gpu_step.py
            rows.append(_in_subprocess(case, cell, arguments.base_dtype))
            print_row(rows[-1], arguments.out)
    print("\n".join(speed_ups(rows)), file=sys.stderr)
    return 0


def _in_subprocess(case: str, cell: str, base_dtype: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--base-dtype", base_dtype, "--child", case, cell]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        failed = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"case": case, "cell": cell, "failed": failed[:300]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
