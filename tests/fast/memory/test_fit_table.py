"""The table of what fits where, in the documentation, is what its command makes."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("fit_table")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def recorded() -> list[dict[str, Any]]:
    path = ROOT / "benchmarks" / "results" / "fit_table.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_documentation_has_the_recorded_table(
    script: ModuleType, recorded: list[dict[str, Any]]
) -> None:
    made = script.tables([script.Row(**row) for row in recorded])
    text = script.DOCUMENT.read_text(encoding="utf-8")
    assert script.with_tables(text, made) == text
    n_cells = sum(len(counts) for counts in script.DEVICES.values())
    assert len(recorded) == len(script.MODELS) * len(script.METHODS) * n_cells


@pytest.mark.parametrize(
    ("model", "method"),
    [
        ("Llama-3.1-8B", "full"),
        pytest.param("Llama-3.1-8B", "LoRA, fp8", marks=pytest.mark.slow),
        pytest.param("Llama-3.1-8B", "LoRA, nf4", marks=pytest.mark.slow),
        pytest.param("Llama-3.1-70B", "LoRA, nf4", marks=pytest.mark.slow),
        pytest.param("Qwen2.5-32B", "LoRA, bf16", marks=pytest.mark.slow),
        pytest.param("Llama-3.1-70B", "LoRA, bf16", marks=pytest.mark.slow),
        pytest.param("Llama-3.1-70B", "LoRA, fp8", marks=pytest.mark.slow),
    ],
)
def test_the_recorded_table_is_what_is_planned_today(
    script: ModuleType, recorded: list[dict[str, Any]], model: str, method: str
) -> None:
    rows = [row for row in recorded if (row["model"], row["method"]) == (model, method)]
    assert [asdict(row) for row in script.plan_rows(model, method)] == rows
