"""Run folders of strangers: a report is made of them, or they are refused with words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from lora.config import LoRAConfig, RunConfig, TrainConfig
from lora.report.page import build_page
from lora.report.records.collect import read_report
from lora.runs.comparison_record import Comparison, read_comparison
from lora.runs.typed_json import parse

FILES: dict[str, Any] = {
    "run.json": {
        "kind": "compare",
        "model": "tiny",
        "device": "cpu",
        "learning_rate": 1e-3,
        "lora": {"rank": 2, "alpha": 16.0, "dropout": 0.0, "targets": "all-linear"},
        "train": {"steps": 4, "seed": 0, "batch_size": 4},
        "run": {"out": "runs", "name": "run"},
        "data": {"now": "2026-01-01", "source": "x.jsonl", "examples": 9, "fingerprint": "a"},
        "sweep": {"grid": {"rank": [2, 4]}, "halving": False, "steps": 4},
        "compare": {"methods": ["lora", "full"], "same": "steps", "train": {"steps": 4}},
        "environment": {"versions": {"torch": "2.13"}},
    },
    "result.json": {
        "steps": 4,
        "eval_loss": 1.5,
        "train_s": 2.0,
        "n_tokens": 99,
        "peak_memory_bytes": 10**9,
        "memory": {"planned": {"weights": 1, "total": 2}, "measured_bytes": 3},
    },
    "sweep.json": {
        "candidates": [{"name": "001-rank2", "settings": {"rank": 2}, "status": "done", "step": 4}],
        "schema_version": 2,
        "rungs": [4],
        "at_once": 1,
        "base_eval_loss": 2.0,
        "steps_taken": 4,
    },
    "compare.json": {
        "kind": "compare",
        "schema_version": 1,
        "base": "tiny",
        "same": "steps",
        "seed": 0,
        "members": [
            {
                **{"name": "lora", "method": "lora", "folder": "members/lora", "steps": 4},
                **{"learning_rate": 1e-3, "rate_chosen": "default", "rates_tried": []},
                **{"train_s": 2.0, "step_s_median": 0.5, "peak_memory_bytes": 10**9},
                **{"planned_memory_bytes": None, "trainable_parameters": 64, "stored_bytes": 256},
                **{"total_parameters": 640, "final_eval_loss": 1.0, "best_eval_loss": 1.0},
                "samples": [{"prompt": "a", "expected": None, "answer": "b"}],
            }
        ],
        "base_samples": [{"prompt": "a", "expected": None, "answer": "c"}],
        "notes": [],
    },
}
ROWS: dict[str, Any] = {
    "metrics.jsonl": {"step": 1, "loss": 2.0, "eval_loss": 1.5, "learning_rate": 1e-3},
    "timings.jsonl": {"step": 1, "step_s": 0.1, "peak_memory_bytes": 9},
    "samples.jsonl": {"step": 1, "prompt": "a", "answer": "b", "expected": "c"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_any_run_folder(fuzz: Any, make: dict[str, Any], folder: Path) -> None:
    def named(name: str) -> st.SearchStrategy[tuple[str, bytes]]:
        whole = FILES.get(name) or ROWS[name]
        values = make["object"](whole, most=2) | make["json"]() | st.just(whole)
        end = b"\n" if name in ROWS else b""
        texts = values.map(lambda value: json.dumps(value).encode() + end)
        return st.tuples(st.just(name), texts | st.binary(max_size=20))

    every = [named(name) for name in (*FILES, *ROWS)]
    run, others = every[0], st.lists(st.one_of(every[1:]), max_size=4)

    def check(files: tuple[tuple[str, bytes], list[tuple[str, bytes]]]) -> None:
        for path in folder.iterdir():
            path.unlink()
        for name, data in [files[0], *files[1]]:
            (folder / name).write_bytes(data)
        report = read_report([folder], folder)
        build_page(report, {})
        json.dumps(report.to_dict(), default=str, allow_nan=False)

    fuzz(st.tuples(run, others), check)


def test_any_comparison(fuzz: Any, make: dict[str, Any], folder: Path) -> None:
    values = make["object"](FILES["compare.json"]) | make["json"]()

    def check(value: Any) -> None:
        (folder / "compare.json").write_text(json.dumps(value))
        read_comparison(folder)

    fuzz(values, check)


def test_the_settings_that_are_fuzzed_are_those_that_are_written() -> None:
    """The files above follow what the package writes: a name that is gone would test nothing."""
    written: dict[str, Callable[[], Any]] = {"lora": LoRAConfig, "train": TrainConfig}
    for part, config in {**written, "run": RunConfig}.items():
        assert FILES["run.json"][part].keys() <= vars(config()).keys()
    faults: list[str] = []
    assert parse(Comparison, FILES["compare.json"], "compare.json", faults) is not None
    assert not faults
