"""Training steps on several GPUs: data parallel and sharded, beside one GPU and the peers.

    python benchmarks/gpu_many.py --list                          # cases for this machine
    python benchmarks/gpu_many.py --out $OUT --budget-s 500
    python benchmarks/gpu_many.py --only '70B*' --blocks 8 --profile
    python benchmarks/gpu_many.py --smoke                         # the code on two CPU processes
    python benchmarks/gpu_many.py --write docs/scale.md           # tables from the results

Random Llama-shaped weights, rank 16 on all linears, AdamW, through the trainer and the real loader.
Each case runs in its own processes, one a GPU; cases on fewer GPUs than the machine has run at the
same time (`beside`). Prints a JSON line for each case as it ends. step_ms is the slowest rank's
median after the warm-up, tokens_per_s that of all devices together, peak_gb (10⁹ bytes) the
largest of the ranks' allocators, ratio tokens_per_s over those of the same case on one device in
the same run. What fails, hangs or is not reached within the budget is a line that says so.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from devices.cases import Case, cases_for
from devices.processes import Machine, run_cases
from devices.rows import print_rows
from devices.table import write_tables
from devices.tasks import profile_task, run_task

RESULTS = Path(__file__).parent / "results"
VERSIONS = ("torch", "triton", "transformers", "peft", "liger-kernel")


def hardware_name(devices: int) -> str:
    """Return the machine's GPUs in words, asked of the driver: this process opens none."""
    import subprocess

    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return f"{devices} CPU processes"
    first = names.strip().splitlines()[0]
    return f"{devices} {first}" if devices > 1 else f"one {first}"


def versions() -> dict[str, str]:
    """Return the versions of what computes, of those packages that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def combine(case: Case, row: dict[str, Any], *, smoke: bool) -> dict[str, Any]:
    """Return the row of a measured case: what its ranks found together."""
    ranks = row.pop("ranks")
    found = dict(ranks[0])
    if "step_ms" in found:
        found["step_ms"] = max(rank["step_ms"] for rank in ranks)
        tokens = found.pop("tokens", None)
        if tokens is None:
            shape = case.sizes(smoke=smoke)
            tokens = shape.rows * shape.tokens * case.devices
        rate = tokens / (found["step_ms"] * 1e-3)
        found |= {"tokens_per_s": round(rate), "tokens_per_s_device": round(rate / case.devices)}
    if "peak_gb" in found:
        found["peak_gb"] = max(rank["peak_gb"] for rank in ranks)
    rounded = {k: round(v, 2) if isinstance(v, float) else v for k, v in found.items()}
    return {**row, **rounded}


def describe(case: Case) -> dict[str, Any]:
    """Return what of a case is in its row."""
    found = {"shape": case.shape, "variant": case.variant, "parallel": case.parallel}
    blocks = {} if case.blocks is None else {"blocks": case.blocks}
    return {**found, **blocks, "devices": case.devices}


def measure(arguments: argparse.Namespace, cases: list[Case], log: Path | None) -> Iterator[Any]:
    """Yield the rows of the cases as they end."""
    machine = Machine(arguments.devices, arguments.smoke, arguments.method)
    task = profile_task if arguments.profile else run_task
    by_name = {case.name: case for case in cases}
    about = {"hardware": hardware_name(arguments.devices), "versions": versions()}
    rates: dict[str, float] = {}
    for row in run_cases(cases, task, machine, arguments.budget_s, log):
        case = by_name[row["case"]]
        if "ranks" in row:
            row = combine(case, row, smoke=arguments.smoke)
            rates[case.name] = row.get("tokens_per_s", 0)
            if case.devices > 1 and rates.get(case.baseline):
                row["ratio"] = round(rates[case.name] / rates[case.baseline], 3)
                row |= {} if case.target is None else {"target": case.target}
        yield {"case": case.name, **describe(case), **row, **about}


def chosen_cases(arguments: argparse.Namespace) -> list[Case]:
    """Return the cases that the arguments name, in order."""
    cases = cases_for(arguments.devices)
    cases = [c for c in cases if any(fnmatch.fnmatch(c.name, p) for p in arguments.only)]
    cases = [c for c in cases if not any(fnmatch.fnmatch(c.name, p) for p in arguments.without)]
    if arguments.blocks is not None:
        cases = [replace(case, blocks=arguments.blocks) for case in cases]
    return cases


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", default=["*"], help="cases by name, * for anything")
    add("--without", nargs="+", default=[], help="cases to leave out, likewise")
    add("--devices", type=int, help="GPUs to use; all of the machine's")
    add("--blocks", type=int, help="fewer blocks than the model has: quick, for tuning")
    add("--budget-s", type=float, default=540, help="seconds after which no case is begun")
    add("--out", type=Path, help="directory of the results, appended to as they come")
    add("--profile", action="store_true", help="kernels and communication of one step instead")
    add("--smoke", action="store_true", help="tiny shapes on CPU processes")
    add("--method", choices=("forkserver", "spawn"), default="forkserver")
    add("--list", action="store_true", help="print the cases and what they take")
    add("--write", type=Path, help="write the tables of the results into this page, and end")
    arguments = parser.parse_args(words)
    arguments.devices = arguments.devices or (2 if arguments.smoke else torch.cuda.device_count())
    return arguments


def main() -> int:
    """Measure the chosen cases; print JSON lines."""
    arguments = parse()
    if arguments.write:
        write_tables(arguments.write, sorted(RESULTS.glob("gpu_many_*.jsonl")))
        return 0
    cases = chosen_cases(arguments)
    if arguments.list:
        for case in cases:
            print(f"{case.name:50} {case.expected_s:4} s, at most {case.limit_s} s")
        return 0
    file, log = None, None
    if arguments.out:
        name = hardware_name(arguments.devices).lower().replace(" ", "_")
        file, log = arguments.out / f"gpu_many_{name}.jsonl", arguments.out / "gpu_many_failed.log"
    return print_rows(measure(arguments, cases, log), file)


if __name__ == "__main__":
    sys.exit(main())
