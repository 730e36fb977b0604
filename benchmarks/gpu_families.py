"""Training steps of today's families on one GPU: ours beside the peers, each in its own process.

    python benchmarks/gpu_families.py --list                      # cells and what they take
    python benchmarks/gpu_families.py --out $OUT --budget-s 480
    python benchmarks/gpu_families.py --only 'Qwen3-0.6B*' '*:ours' --out $OUT
    python benchmarks/gpu_families.py --smoke                     # the code on a CPU, tiny sizes
    python benchmarks/gpu_families.py --write                     # tables from the results

The sizes of the published models, random weights, rank 16 on all linears, AdamW, bf16. "Ours" goes
through the trainer and the real loader, with the step that a run would choose (`step`). `sweep_4`
trains four candidates together and one alone; `theirs_captured` is transformers' model adapted by
`apply_lora` on our captured step. Prints a JSON line for each cell as it ends: step_ms is the
median after the warm-up, peak_gb (10⁹ bytes) the allocator's peak, tflop the arithmetic of a step
with attention and head. What does not fit, fails or hangs is a line that says so.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from devices import processes
from devices.processes import Machine, run_cases
from devices.rows import print_rows
from families.cases import Cell, cells
from families.table import write_tables
from families.tasks import run_cell
from gpu_many import hardware_name, versions

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
PRELOADED = (
    "families.tasks",
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.gemma3.modeling_gemma3",
    "peft",
)


def row_of(cell: Cell, row: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a cell that ended."""
    found = row.pop("ranks")[0]
    row |= {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in found.items()}
    if "step_ms" in row:
        row["tokens_per_s"] = round(row["tokens"] / (row["step_ms"] * 1e-3))
        row["tflops"] = float(f"{row['tflop'] / (row['step_ms'] * 1e-3):.5g}")
    return row


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of the chosen cells as they end."""
    chosen = {cell.name: cell for cell in chosen_cells(arguments)}
    about = {"hardware": hardware_name(1), "versions": versions()}
    processes.PRELOADED[:] = PRELOADED
    machine = Machine(1, arguments.smoke, arguments.method)
    log = None if arguments.out is None else arguments.out / "gpu_families_failed.log"
    for row in run_cases(chosen.values(), run_cell, machine, arguments.budget_s, log):
        cell = chosen[row["case"]]
        del row["case"]
        named = {"shape": cell.shape, "variant": cell.variant}
        yield {**named, **(row_of(cell, row) if "ranks" in row else row), **about}


def chosen_cells(arguments: argparse.Namespace) -> list[Cell]:
    """Return the cells that the arguments name, in order."""

    def is_named(cell: Cell, patterns: list[str]) -> bool:
        return any(fnmatch.fnmatch(cell.name, pattern) for pattern in patterns)

    found = [cell for cell in cells() if is_named(cell, arguments.only)]
    return [cell for cell in found if not is_named(cell, arguments.without)]


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", default=["*"], help="cells by name, * for anything")
    add("--without", nargs="+", default=[], help="cells to leave out, likewise")
    add("--budget-s", type=float, default=540, help="seconds after which no cell is begun")
    add("--out", type=Path, help="directory of the results, appended to as they come")
    add("--smoke", action="store_true", help="tiny sizes on the CPU")
    add("--method", choices=("forkserver", "spawn"), default="forkserver")
    add("--list", action="store_true", help="print the cells and what they take")
    add(
        "--write", type=Path, nargs="?", const=PAGE, help="write the tables into this page, and end"
    )
    return parser.parse_args(words)


def main() -> int:
    """Measure the chosen cells; print JSON lines."""
    arguments = parse()
    if arguments.write:
        write_tables(arguments.write, sorted((HERE / "results").glob("gpu_families_*.jsonl")))
        return 0
    if arguments.list:
        chosen = chosen_cells(arguments)
        for cell in chosen:
            print(f"{cell.name:45} {cell.expected_s:4} s, at most {cell.limit_s} s")
        print(f"{len(chosen)} cells, {sum(cell.expected_s for cell in chosen)} s")
        return 0
    file = None
    if arguments.out:
        file = arguments.out / f"gpu_families_{hardware_name(1).lower().replace(' ', '_')}.jsonl"
    return print_rows(measure(arguments), file)


if __name__ == "__main__":
    sys.exit(main())
