"""Records with lists of records, and records that check themselves."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import lora.cli
from lora.runs.directory import create_run
from lora.runs.read_record import read_result
from lora.runs.record import MetricsRow, RunResult
from lora.runs.typed_json import Faults, json_text, parse, to_json


@dataclass
class Part:
    number: int
    """At least 0."""

    def __post_init__(self) -> None:
        if self.number < 0:
            raise ValueError(f"number is {self.number}, below 0")


@dataclass
class Whole:
    parts: list[Part]
    rungs: tuple[int, ...] = ()
    values: dict[str, list[int]] = field(default_factory=dict)


def test_lists_of_records_are_read_as_they_were_written() -> None:
    whole, faults = Whole([Part(1), Part(2)], (3, 4), {"a": [5]}), Faults()
    written = to_json(whole)
    assert written == {
        "parts": [{"number": 1}, {"number": 2}],
        "rungs": [3, 4],
        "values": {"a": [5]},
    }
    assert parse(Whole, written, "x.json", faults) == whole
    assert not faults


def test_what_a_record_refuses_is_a_fault_with_its_place() -> None:
    faults: Faults = []
    value = {"parts": [{"number": 1}, {"number": -2}], "rungs": [1, "2"], "values": {"a": [None]}}
    assert parse(Whole, value, "x.json", faults) is None
    assert faults[0] == "x.json: parts, number 2: number is -2, below 0"
    assert faults[1] == "x.json: rungs, number 2 is '2', not a whole number"
    assert faults[2].startswith("x.json: values: a, number 1 is None")


def test_what_json_does_not_have_is_null_and_comes_back_as_nan(tmp_path: Path) -> None:
    values = {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": -math.inf}, "e": (1, "x", None)}
    expected = {"a": None, "b": [None, 1.5], "c": {"d": None}, "e": [1, "x", None]}
    assert json.loads(json_text(values), parse_constant=pytest.fail) == expected
    plain = {"loss": 1 / 3, "step": 1}
    assert json_text(plain, sort_keys=True) == json.dumps(plain, sort_keys=True)
    with create_run(tmp_path, "run") as run:
        run.write_result(RunResult(3, math.nan, 1.0, 5, 7, best_eval_loss=math.inf))
        run.append_metrics(MetricsRow(1, loss=math.inf))
    for file in ("result.json", "metrics.jsonl"):
        json.loads((run.folder / file).read_text(), parse_constant=pytest.fail)
    result = read_result(run.folder)
    assert result is not None
    assert math.isnan(result.eval_loss)
    assert math.isnan(result.best_eval_loss)


def test_every_command_prints_such_json() -> None:
    for path in Path(lora.cli.__file__).parent.glob("*.py"):
        assert ".dumps(" not in path.read_text(encoding="utf-8"), f"{path}: print json_text(…)"
