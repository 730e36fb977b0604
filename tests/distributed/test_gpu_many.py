"""The benchmark of several GPUs, run on CPU processes: what it does with cases, not how fast."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lora.distributed.world import World

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of that name in `benchmarks/devices`."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return lambda name: importlib.import_module(f"devices.{name}")


def _task(case: Any, world: World, smoke: bool) -> dict[str, Any]:
    if case.variant == "raises" and world.rank == 1:
        raise ValueError("as this rank does")
    if case.variant in ("raises", "hangs"):
        print("sleeping", flush=True)
        time.sleep(60)
    return {"rank": world.rank}


def test_a_case_that_fails_or_hangs_is_a_row(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, processes = benchmark("cases"), benchmark("processes")
    monkeypatch.setattr(processes, "PRELOADED", ["torch", "lora.distributed.start"])
    planned = [
        cases.Case("a", kind, "ddp", 2, expected_s, limit_s)
        for kind, expected_s, limit_s in (
            ("raises", 1, 50), ("hangs", 1, 5), ("works", 1, 50), ("late", 500, 600),
        )
    ]  # fmt: skip
    log = tmp_path / "failed.log"
    machine = processes.Machine(2, smoke=True)
    rows = {r["case"]: r for r in processes.run_cases(planned, _task, machine, 100, log)}
    assert rows["a:raises:ddp:2"]["failed"] == "rank 1 ended with 1: ValueError: as this rank does"
    assert rows["a:hangs:ddp:2"]["failed"] == "not in 5 s; rank 0 said last: sleeping"
    assert rows["a:works:ddp:2"]["ranks"] == [{"rank": 0}, {"rank": 1}]
    assert "were left" in rows["a:late:ddp:2"]["not_run"]
    assert "as this rank does" in log.read_text()
    assert "in _task" in log.read_text()  # where the hanging ranks were
    assert machine.free == [0, 1]


def test_communication_that_nothing_hides_is_counted(benchmark: Any) -> None:
    profile = benchmark("profile")
    ms = 10**6
    kernels = [
        profile.Kernel("gemm", 0, 10 * ms),
        profile.Kernel("ncclDevKernel_AllGather", 5 * ms, 13 * ms),
        profile.Kernel("norm", 12 * ms, 14 * ms),
        profile.Kernel("norm", 15 * ms, 16 * ms),
    ]
    found = profile.summarise(kernels)
    assert found["step_ms"] == 16
    assert found["compute_ms"] == 13
    assert found["communication_ms"] == 8
    assert found["exposed_ms"] == 2
    assert found["idle_ms"] == 1
    assert found["top"][0] == ["gemm", 10.0, 1]


def test_every_case_of_every_machine_has_a_row(benchmark: Any) -> None:
    """With the real sizes, which the run on CPU processes does not take."""
    cases, script = benchmark("cases"), importlib.import_module("gpu_many")
    for devices in (2, 4):
        for case in cases.cases_for(devices):
            found = {"step_ms": 100.0, "peak_gb": 1.0}
            if case.variant == "probe":
                found = {"gemm_tflops": 1.0}
            if case.shape == cases.SWEEP:
                found |= {"tokens": 8 * 4 * 512}
            else:
                assert case.variant == "probe" or case.sizes().rows >= 1
            row = script.combine(case, {"ranks": [found] * case.devices}, smoke=False)
            assert ("tokens_per_s" in row) == (case.variant != "probe"), case.name
            assert case.target is None or case.devices > 1


def test_tables_go_between_the_marks(benchmark: Any, tmp_path: Path) -> None:
    table = benchmark("table")
    row = {
        "case": "8B-4x2048:ours:ddp:2", "shape": "8B-4x2048", "variant": "ours",
        "parallel": "ddp", "devices": 2, "hardware": "2 NVIDIA H100 80GB HBM3", "step_ms": 500.0,
        "tokens_per_s": 32000, "tokens_per_s_device": 16000, "peak_gb": 48.0, "ratio": 1.97,
        "target": 1.95,
    }  # fmt: skip
    alone = {**row, "case": "8B-4x2048:ours:none:1", "parallel": "none", "tokens_per_s": 16240}
    sharded = {
        **row, "case": "70B-1x4096:ours:fsdp:2", "shape": "70B-1x4096", "parallel": "fsdp",
        "tokens_per_s_device": 2730, "planned_gb": 47.0,
    }  # fmt: skip
    peer = {**sharded, "variant": "peft_liger_recompute", "tokens_per_s": 16000, "case": "peer"}
    failed = {"case": "x", "failed": "not in 8 s"}
    results, page = tmp_path / "gpu_many_x.jsonl", tmp_path / "page.md"
    results.write_text("".join(json.dumps(r) + "\n" for r in (failed, alone, row, sharded, peer)))
    page.write_text("before\n<!-- gpu_many:start -->\nold\n<!-- gpu_many:end -->\nafter\n")
    table.write_tables(page, [results])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| 2 H100 | 16,240 tokens/s | 32,000 tokens/s | 1.97x | 48.0 |" in text
    assert "2,730 (2.50x NeMo's) | 48.0, 47.0 planned | 2.00x |" in text


@pytest.mark.slow
def test_every_kind_of_case_runs_on_cpu_processes(tmp_path: Path) -> None:
    only = ["probe*", "135M-4x512:ours:*", "70B-1x4096:*:fsdp:2", "1B-4x2048:peft*"]
    command = [sys.executable, "benchmarks/gpu_many.py", "--smoke", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--only", *only],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    (file,) = tmp_path.glob("gpu_many_*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    log = tmp_path / "gpu_many_failed.log"
    assert done.returncode == 0, log.read_text() if log.exists() else done.stderr
    assert len(rows) == 8
    assert [r["ratio"] for r in rows if r["case"] == "1B-4x2048:peft_liger:ddp:2"]
