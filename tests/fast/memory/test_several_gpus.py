"""Plans of one of several GPUs against the peaks that `benchmarks/gpu_many.py` has measured."""

from __future__ import annotations

import importlib
import json
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lora.config import LoRAConfig, MemoryConfig
from lora.fast.memory.plan import MemoryPlan, MemoryPlanner, PlanInputs

ROOT = Path(__file__).parents[3]
MAX_ERROR_FRACTION = 0.10
BUDGET = re.compile(r"planned of ([\d.]+) GB")


def measured() -> list[dict[str, Any]]:
    """Return the rows of our own variants with a peak, the newest of each case and hardware."""
    rows = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("gpu_many_*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            is_ours = str(row.get("variant", "")).startswith("ours") and "peak_gb" in row
            if is_ours and row.get("planned_gb") and row.get("blocks") is None:
                rows[row["case"], row["hardware"]] = row
    return list(rows.values())


def name_of(row: dict[str, Any]) -> str:
    return f"{row['case']} on {row['hardware']}"


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("devices.cases")


@cache
def planner_of(cases: ModuleType, shape: str, variant: str, parallel: str) -> MemoryPlanner:
    gpu_step = importlib.import_module("gpu_step")
    sizes = cases.SHAPES[shape]
    lora = None if variant == "ours_full" else LoRAConfig(rank=gpu_step.RANK)
    return MemoryPlanner(
        PlanInputs(
            gpu_step.build_empty(sizes).config,
            lora,
            sizes.rows,
            sizes.tokens,
            "cuda",
            torch.bfloat16,
            packed=False,
            fp8="fp8" in variant,
            devices=2,
            parallel="fsdp" if parallel == "fsdp" else "ddp",
        )
    )


def planned_now(cases: ModuleType, row: dict[str, Any]) -> tuple[MemoryPlan, int]:
    """Return today's plan of a row within the budget of its time, and its evaluation's bytes."""
    planner = planner_of(cases, row["shape"], row["variant"], row["parallel"])
    planner = planner.on_devices(row["devices"])
    found = BUDGET.search(row["mode"])
    budget = MemoryConfig("auto", float(found[1])) if found else MemoryConfig("none")
    evaluation = 0
    if planner.plan(memory=budget).step == "fast":
        evaluation = planner.evaluation_bytes(planner.inputs.micro_batch_size)
    return planner.plan(memory=budget), evaluation


@pytest.mark.parametrize("row", measured(), ids=name_of)
def test_the_plan_of_its_time_was_near_the_peak(row: dict[str, Any]) -> None:
    assert row["planned_gb"] == pytest.approx(row["peak_gb"], rel=MAX_ERROR_FRACTION)


@pytest.mark.slow
@pytest.mark.parametrize("row", measured(), ids=name_of)
def test_todays_plan_is_near_the_peak(cases: ModuleType, row: dict[str, Any]) -> None:
    plan, evaluation = planned_now(cases, row)
    # The benchmark evaluates nothing, which a plan leaves room for.
    total_gb = (plan.total - evaluation) / 1e9
    assert total_gb == pytest.approx(row["peak_gb"], rel=MAX_ERROR_FRACTION)
