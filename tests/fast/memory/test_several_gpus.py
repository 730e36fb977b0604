"""Plans of one of several GPUs against the peaks that `benchmarks/gpu_many.py` has measured."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lora.fast.memory.planner import NCCL_BYTES

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
MAX_ERROR_FRACTION = 0.10


@pytest.fixture(scope="module")
def plans() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("devices.plans")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def rows(plans: ModuleType) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = plans.measured_rows()
    return found


def test_plans_are_near_the_peaks(plans: ModuleType, rows: list[dict[str, Any]]) -> None:
    of_several = [row for row in rows if row["devices"] > 1]
    assert len(of_several) >= 6
    for row in of_several:
        checked = plans.plan_again(row)
        assert abs(checked.error_fraction) <= MAX_ERROR_FRACTION, checked


@pytest.mark.slow
def test_all_plans_are_near_the_peaks_and_in_the_documentation(
    plans: ModuleType, rows: list[dict[str, Any]]
) -> None:
    checked = [plans.plan_again(row) for row in rows]
    for one in checked:
        assert abs(one.error_fraction) <= MAX_ERROR_FRACTION, one
    script = importlib.import_module("fit_table")
    text = script.DOCUMENT.read_text(encoding="utf-8")
    assert script.with_tables(text, plans.peaks_table(checked), script.PEAKS) == text


def test_what_nccl_takes_is_left_free() -> None:
    used: dict[tuple[str, ...], dict[str, float]] = {}
    for path in (BENCHMARKS / "results").glob("gpu_many_*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row.get("device_gb") and row["parallel"] in ("none", "ddp"):
                key = (path.name, row["shape"], row["variant"])
                used.setdefault(key, {})[row["parallel"]] = row["device_gb"]
    more = [each["ddp"] - each["none"] for each in used.values() if len(each) == 2]
    assert len(more) >= 4
    assert max(more) * 1e9 <= NCCL_BYTES
