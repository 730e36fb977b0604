"""The typed record of a run: written, read again, older versions, and every fault named."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora.errors import CheckpointError
from lora.runs.read_record import (
    read_metrics,
    read_result,
    read_run_record,
    read_timings,
    step_times,
)
from lora.runs.record import (
    RUN_FILE,
    SCHEMA_VERSION,
    DataRecord,
    MemoryResult,
    MetricsRow,
    RunRecord,
    RunResult,
    describe_environment,
)
from lora.runs.typed_json import parse, to_json

OLD: dict[str, Any] = {
    "model": "tiny",
    "lora": {"rank": 4},
    "from_adapter": None,
    "train": {"steps": 3, "seed": 1},
    "data": {"source": "a.jsonl", "examples": 9, "now": "2026-01-01T00:00:00"},
}


def write(directory: Path, name: str, value: Any) -> None:
    (directory / name).write_text(json.dumps(value))


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = RunRecord(
        kind="finetune",
        method="full",
        model="tiny",
        learning_rate=1e-4,
        train={"steps": 3},
        data=DataRecord(source="a.jsonl", counts={"n_split": 1}, warnings=("one",)),
        environment=describe_environment(),
    )
    values = record.to_json()
    assert values["schema_version"] == 1
    assert values["lora"] is None  # full fine-tuning, as readers of the file know it
    assert "deterministic" not in values
    write(tmp_path, "run.json", values)
    assert read_run_record(tmp_path) == record


@pytest.mark.parametrize(
    ("values", "kind", "method"),
    [
        (OLD, "finetune", "lora"),
        ({**OLD, "lora": None}, "finetune", "full"),
        ({**OLD, "lora": None, "from_adapter": "a"}, "finetune", "lora"),
        ({**OLD, "sweep": {"grid": {}, "halving": False, "steps": 3}}, "sweep", "lora"),
        ({**OLD, "sweep": None}, "candidate", "lora"),
        ({"kind": "compare", "compare": {}}, "compare", None),
        ({"method": "peft", "train": {}}, "member", "peft"),
        ({"settings": {"use_lora": True}, "base": "b", "data": "prose"}, "character", "lora"),
        ({"settings": {"use_lora": True}, "base": None, "data": "prose"}, "character", "full"),
        ({}, "finetune", None),
    ],
)
def test_files_without_a_version_are_read(
    tmp_path: Path, values: dict[str, Any], kind: str, method: str | None
) -> None:
    write(tmp_path, "run.json", values)
    record = read_run_record(tmp_path)
    assert (record.kind, record.method) == (kind, method)
    if values.get("data") == "prose":
        assert record.data.source == "prose"


def test_a_newer_version_is_refused_and_says_which(tmp_path: Path) -> None:
    write(tmp_path, "run.json", {**OLD, "schema_version": 9})
    with pytest.raises(CheckpointError, match=r"schema_version 9: .* reads up to 1"):
        read_run_record(tmp_path)


def test_every_fault_is_named_at_once(tmp_path: Path) -> None:
    damaged = {**OLD, "train": 3, "learning_rate": "high", "data": {**OLD["data"], "examples": 1.5}}
    write(tmp_path, "run.json", damaged)
    with pytest.raises(CheckpointError) as caught:
        read_run_record(tmp_path)
    for words in (
        f"{tmp_path / 'run.json'}: train is 3, not an object",
        "learning_rate is 'high', not a number",
        "data: examples is 1.5, not a whole number",
        "Restore the file from a backup",
    ):
        assert words in str(caught.value)
    faults: list[str] = []
    record = read_run_record(tmp_path, faults)
    assert len(faults) == 3
    assert (record.model, record.train, record.data.source) == ("tiny", None, "a.jsonl")


@pytest.mark.parametrize("text", ["{", "[]", "3", ""])
def test_what_is_not_an_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.json"):
        read_run_record(tmp_path)


def test_rows_are_typed_and_a_bad_one_is_named_by_its_line(tmp_path: Path) -> None:
    rows = [MetricsRow(0, eval_loss=2.0), MetricsRow(1, loss=1.5, learning_rate=1e-3, tokens=7)]
    lines = [json.dumps(to_json(row), sort_keys=True) for row in rows]
    assert lines[0] == '{"eval_loss": 2.0, "step": 0}'
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines) + "\n")
    assert read_metrics(tmp_path) == rows
    path.write_text('{"step": 1}\n{"step": 2, "loss": [1]}\n')
    with pytest.raises(
        CheckpointError, match=r"metrics\.jsonl, line 2: loss is \[1\], not a number"
    ):
        read_metrics(tmp_path)


def test_a_run_without_results_or_step_times_yet(tmp_path: Path) -> None:
    assert read_result(tmp_path) is None
    assert read_timings(tmp_path) == []
    with pytest.raises(CheckpointError, match=r"timings\.jsonl: it holds no step times"):
        step_times(tmp_path)


def test_a_result_keeps_its_parts(tmp_path: Path) -> None:
    result = RunResult(3, 1.0, 2.0, 99, 10**9, 0.9, memory=MemoryResult(measured_bytes=5))
    write(tmp_path, "result.json", to_json(result))
    assert read_result(tmp_path) == result
    write(tmp_path, "result.json", to_json(replace(result, eval_loss=float("nan"))))
    read = read_result(tmp_path)
    assert read is not None
    assert math.isnan(read.eval_loss)  # there was no validation data
    write(tmp_path, "result.json", {"steps": 3})
    with pytest.raises(CheckpointError, match=r"result\.json: eval_loss is missing"):
        read_result(tmp_path)


def test_a_number_beyond_a_float_is_a_fault() -> None:
    faults: list[str] = []
    assert parse(MemoryResult, {"error_fraction": 10**400}, "here", faults) == MemoryResult()
    assert "here: error_fraction is" in faults[0]


def test_the_environment_names_versions_and_not_the_machine() -> None:
    found = describe_environment()
    assert "torch" in found.versions
    assert found.python is not None
    assert os.uname().nodename not in str(found)


def test_settings_of_an_old_record_have_the_names_of_today(tmp_path: Path) -> None:
    old = {
        "schema_version": SCHEMA_VERSION,
        "kind": "finetune",
        "train": {"micro_batches": 2},
        "compare": {"train": {"micro_batches": 4}},
    }
    (tmp_path / RUN_FILE).write_text(json.dumps(old))
    record = read_run_record(tmp_path)
    assert record.train == {"gradient_accumulation": 2}
    assert record.compare == {"train": {"gradient_accumulation": 4}}
