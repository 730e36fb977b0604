"""Plans of today for what `gpu_many.py` has measured: of one of the devices of each row."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from devices.cases import Case
from devices.table import read_rows
from devices.whole import planner_of
from lora.config import MemoryConfig
from lora.fast.memory.planner import MemoryPlanner

RESULTS = Path(__file__).parents[1] / "results"
BUDGET = re.compile(r"planned of ([\d.]+) GB")


@dataclass(frozen=True)
class Checked:
    """A row, and what is planned for it now, in GB (10⁹ bytes)."""

    row: dict[str, Any]
    evaluation_gb: float
    """Of the plan: for a validation pass, which the benchmark leaves out."""
    planned_gb: float

    @property
    def error_fraction(self) -> float:
        """Planned without the evaluation / measured − 1."""
        step_gb: float = self.planned_gb - self.evaluation_gb
        return step_gb / float(self.row["peak_gb"]) - 1


def measured_rows() -> list[dict[str, Any]]:
    """Return the rows of our own variants with a plan, the newest of each case and hardware."""
    rows = read_rows(sorted(RESULTS.glob("gpu_many_*.jsonl")))
    return [row for row in rows if row["variant"].startswith("ours") and "planned_gb" in row]


def plan_again(row: dict[str, Any]) -> Checked:
    """Return a row with today's plan within the budget that it was planned for."""
    parallel = "fsdp" if row["parallel"] == "fsdp" else "ddp"
    planner = _planner(row["shape"], row["variant"], parallel).on_devices(row["devices"])
    found = BUDGET.search(row["mode"])
    memory = MemoryConfig("auto", float(found[1])) if found else MemoryConfig("none")
    plan = planner.plan(memory=memory)
    evaluation = 0
    if plan.step == "fast":
        evaluation = planner.evaluation_bytes(planner.inputs.micro_batch_size)
    return Checked(row, evaluation / 1e9, plan.total / 1e9)


@cache
def _planner(shape: str, variant: str, parallel: str) -> MemoryPlanner:
    case = Case(shape, variant, parallel, devices=2, expected_s=0, limit_s=0)
    return planner_of(case, case.sizes())


def peaks_table(checked: Sequence[Checked]) -> str:
    """Return the rows of several devices as a table in Markdown."""
    head = "| | planned | of it for evaluation | measured | without evaluation |"
    return "\n".join([head, "|---|---|---|---|---|", *_lines(checked)])


def _lines(checked: Sequence[Checked]) -> Iterator[str]:
    names = {"ours": "LoRA, bf16", "ours_fp8": "LoRA, fp8", "ours_full": "full"}
    for one in sorted(checked, key=lambda one: (-one.row["peak_gb"], one.row["case"])):
        row = one.row
        if row["devices"] == 1:
            continue
        gpus = row["hardware"].replace(" NVIDIA", "").replace(" 80GB HBM3", "")
        size, _, sizes = row["shape"].partition("-")
        what = f"{size}, {names[row['variant']]}, {sizes.replace('x', '×')}, {row['parallel']}"
        yield (
            f"| {what}, {gpus} | {one.planned_gb:.1f} | {one.evaluation_gb:.1f} | "
            f"{row['peak_gb']:.1f} | {100 * one.error_fraction:+.1f} % |"
        )
