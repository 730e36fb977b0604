"""The sweep's record: read as it was written, older versions too, and refused with the reason."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lora.errors import CheckpointError
from lora.runs.directory import Run
from lora.runs.read_record import read_run_record
from lora.runs.record import SweepSettings
from lora.runs.sweep_record import (
    CandidateState,
    SweepOutcome,
    SweepRecord,
    WaveTiming,
    append_wave_timing,
    find_best,
    rank,
    read_outcome,
    read_sweep_record,
    read_wave_timings,
    write_outcome,
    write_sweep_record,
)


def make_record() -> SweepRecord:
    done = CandidateState("001-rank4", {"rank": 4}, "done", 12, eval_loss=0.5, row=48)
    better = CandidateState("002-rank8", {"rank": 8}, "done", 12, eval_loss=0.4, row=48)
    stopped = CandidateState("003-rank16", {"rank": 16}, step=3, eval_loss=0.9)
    stopped.stop(3, "halving at step 3: place 3 of 3")
    failed = CandidateState("004-rank32", {"rank": 32}, step=1)
    failed.fail("step 2: the loss is nan")
    return SweepRecord([failed, stopped, done, better], (3, 6, 12), 4, 2.0, 12)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    run, record = Run(tmp_path), make_record()
    assert read_sweep_record(tmp_path) is None
    assert read_outcome(tmp_path) is None
    assert read_wave_timings(tmp_path) == []
    write_sweep_record(run, record)
    outcome = SweepOutcome("002-rank8", 0.4, 1.5)
    write_outcome(run, outcome)
    timing = WaveTiming(12, 1.5, 12, 10**9, 2.0, ["001-rank4", "002-rank8"], 12)
    append_wave_timing(run, timing)
    assert read_sweep_record(tmp_path) == record
    assert read_outcome(tmp_path) == outcome
    assert read_wave_timings(tmp_path) == [timing]


def test_the_best_comes_first_and_what_failed_last() -> None:
    record = make_record()
    names = [candidate.name for candidate in rank(record.candidates)]
    assert names == ["002-rank8", "001-rank4", "003-rank16", "004-rank32"]
    best = find_best(record.candidates)
    assert best is not None
    assert best.name == "002-rank8"
    assert find_best(record.candidates[:2]) is None


def version_1() -> dict[str, Any]:
    """As lora-lm wrote `sweep.json` before it had a version."""
    whole = asdict(make_record())
    del whole["schema_version"]
    whole["standings"] = whole.pop("candidates")
    for candidate in whole["standings"]:
        del candidate["stopped_at"]
    return whole


def test_version_1_is_read(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps(version_1()))
    assert read_sweep_record(tmp_path) == make_record()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 3}, "schema_version 3"),
        ({"rungs": []}, "out of range"),
        ({"at_once": 0}, "out of range"),
        ({"at_once": "4"}, "at_once is '4'"),
        ({"candidates": [{"name": "../x", "settings": {}}]}, "no name of a folder"),
        ({"candidates": [{"name": "..", "settings": {}}]}, "no name of a folder"),
        ({"candidates": [{"name": "a", "settings": {}, "step": -1}]}, "below 0"),
        ({"candidates": [{"name": "a", "settings": {}, "status": "lost"}]}, "status is 'lost'"),
        ({"candidates": [{"name": "a", "settings": {}, "stopped_at": 3}]}, "stopped_at 3"),
        ({"candidates": [{"name": "a", "settings": {}, "status": "stopped"}]}, "stopped_at None"),
    ],
)
def test_a_damaged_record_is_refused_with_the_reason(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({**asdict(make_record()), **change}))
    with pytest.raises(CheckpointError, match=words) as caught:
        read_sweep_record(tmp_path)
    assert "sweep.json" in str(caught.value)


def test_settings_are_those_of_a_sweep_alone(tmp_path: Path) -> None:
    path, settings = tmp_path / "run.json", {"grid": {"rank": [2, 4]}, "halving": True, "steps": 9}
    path.write_text(json.dumps({"model": "tiny", "sweep": settings}))
    found = read_run_record(tmp_path)
    assert found.kind == "sweep"
    assert found.sweep == SweepSettings({"rank": [2, 4]}, halving=True, steps=9)
    path.write_text(json.dumps({"model": "tiny", "sweep": None}))  # a candidate of one
    assert read_run_record(tmp_path).sweep is None
    path.write_text(json.dumps({"sweep": {"grid": {}, "halving": 1, "steps": 9}}))
    with pytest.raises(CheckpointError, match="halving is 1"):
        read_run_record(tmp_path)
