"""The benchmark of today's families, on a CPU with tiny sizes: what it does, not how fast."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora.distributed.world import ALONE

pytestmark = pytest.mark.filterwarnings("ignore::Warning")
"""Of the peers."""
ROOT = Path(__file__).parents[2]


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of that name in `benchmarks/families`."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return lambda name: importlib.import_module(f"families.{name}")


def cell_of(families: Any, shape: str, variant: str) -> Any:
    (cell,) = (c for c in families("cases").cells() if c.name == f"{shape}:{variant}")
    return cell


@pytest.mark.parametrize(
    ("shape", "variant"),
    [
        ("Gemma-3-1B-4x512", "ours_packed"),
        ("Qwen3-0.6B-4x512", "sweep_4"),
        ("Gemma-3-1B-4x2048", "peft"),
        ("Llama-1B-4x2048", "theirs_captured"),
    ],
)
def test_a_cell_measures(shape: str, variant: str, families: Any) -> None:
    if not variant.startswith(("ours", "sweep")):
        pytest.importorskip("peft")
    cell = cell_of(families, shape, variant)
    script = importlib.import_module("gpu_families")
    row = script.row_of(cell, {"ranks": [families("tasks").run_cell(cell, ALONE, True)]})
    assert row["step_ms"] > 0
    assert row["tokens"] == {"ours_packed": 1024, "sweep_4": 256}.get(variant, 64)
    assert row["tflop"] > 0


def test_the_run_beside_a_sweep_takes_the_batches_of_one_candidate(
    families: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, tasks = cell_of(families, "Qwen3-0.6B-4x512", "sweep_4"), families("tasks")
    script, rows = importlib.import_module("sweep_speed"), []

    def build_stream(shape: Any, *arguments: Any, **settings: Any) -> Any:
        rows.append(shape.rows)
        return importlib.import_module("one_gpu.models").build_stream(shape, *arguments, **settings)

    monkeypatch.setattr(script, "build_stream", build_stream)
    tasks.run_cell(cell, ALONE, True)
    assert len(rows) > 1
    assert set(rows) == {cell.sizes(smoke=True).rows}


def test_what_trains_is_what_the_name_says(families: Any) -> None:
    pytest.importorskip("peft")

    def trained(variant: str) -> int:
        cell = cell_of(families, "Qwen3-0.6B-4x512", variant)
        return int(families("tasks").run_cell(cell, ALONE, True)["trained_parameters"])

    sides = ((64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64))
    assert trained("peft") == 2 * 16 * sum(map(sum, sides))
    block = sum(inputs * outputs for inputs, outputs in sides) + 2 * 64 + 2 * 16
    assert trained("full_transformers") == 2 * block + 256 * 64 + 64


def test_arithmetic_is_counted_by_hand(families: Any) -> None:
    cases, tasks = families("cases"), families("tasks")

    def tiny(config: dict[str, Any]) -> Any:
        sizes = {name: cases.SMOKE_SIZES.get(name, value) for name, value in config.items()}
        return cases.shape_of(sizes, 2, 32, 1, 3)

    shape = tiny(cases.LLAMA_1B)
    block = 64 * (64 + 32 + 32 + 64 + 3 * 96)
    weights, attention = 2 * block + 256 * 64, 2 * 2 * 32 * 33 // 2 * 64
    counted = tasks.flops_of(shape, trains_all=False)
    assert counted == 4 * weights * 64 + 12 * attention
    assert tasks.flops_of(shape, trains_all=True) - counted == 2 * weights * 64
    gemma = tiny(cases.GEMMA3_1B)
    local = 16 * 17 // 2 + 16 * 16  # of the first block; the second attends to all
    less = 12 * 2 * 64 * (32 * 33 // 2 - local)
    assert tasks.flops_of(gemma, trains_all=False) == counted - less


def test_a_model_that_does_not_fit_is_skipped(families: Any) -> None:
    tasks = families("tasks")
    cell = cell_of(families, "Qwen3-0.6B-4x512", "ours_full")

    def too_much(*_: object, **__: object) -> object:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "available_bytes", lambda kind: 1)
        assert "GB planned" in tasks.run_cell(cell, ALONE, True)["skipped"]
        patch.setattr(tasks, "_measured", too_much)
        assert "Tried to allocate" in tasks.run_cell(cell, ALONE, True)["skipped"]


def test_tables_say_what_was_wanted(families: Any, tmp_path: Path) -> None:
    table, about = families("table"), {"hardware": "one NVIDIA H200", "versions": {"torch": "2.11"}}
    name = "Qwen3-0.6B-4x512"

    def row(variant: str, step_ms: float, shape: str = name, **more: Any) -> str:
        found = {"shape": shape, "variant": variant, "step_ms": step_ms, "peak_gb": 2.5}
        return json.dumps({**found, "tflops": 8 / step_ms, **more, **about}) + "\n"

    rows = [
        row("ours", 10, step="fast step: merged"), row("peft", 160), row("peft_liger", 110),
        row("ours", 8, f"Llama-as-{name}", tflops=1.0), row("sweep_4", 25, one_ms=10.5),
        json.dumps({"shape": name, "variant": "full_transformers", "skipped": "out of memory: x",
                    **about}) + "\n",
    ]  # fmt: skip
    results, page = tmp_path / "gpu_families_x.jsonl", tmp_path / "page.md"
    results.write_text("".join(rows))
    page.write_text("a\n<!-- gpu_families:start -->\n<!-- gpu_families:end -->\nb\n")
    table.write_tables(page, [results])
    text = page.read_text()
    assert "One H200; torch 2.11:" in text
    assert "| LoRA, PEFT | 160.0 ms / 2.5 GB, 16.0x |" in text
    assert "| full fine-tuning, transformers | does not fit |" in text
    assert "| does not fit | 16.00x (wanted 15) | 11.00x | 1.25 (wanted at most 1.15) |" in text
    assert "4 candidates" in text
    assert "1.68 times as fast as 4 in turn" in text


@pytest.mark.slow
def test_cells_run_in_processes_of_their_own(tmp_path: Path) -> None:
    only = ["*:probe", "Gemma-3-1B-4x512:ours*", "Qwen3-0.6B-4x512:peft*"]
    command = [sys.executable, "benchmarks/gpu_families.py", "--smoke", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--only", *only],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    (file,) = tmp_path.glob("gpu_families_*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    log = tmp_path / "gpu_families_failed.log"
    assert done.returncode == 0, log.read_text() if log.exists() else done.stderr
    assert [row["variant"] for row in rows if "step_ms" in row or "skipped" in row] == [
        "ours", "ours_packed", "peft_liger", "peft", "ours_full"
    ]  # fmt: skip
