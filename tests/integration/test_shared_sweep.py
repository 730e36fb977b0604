"""A sweep in several processes: candidates as in one process, also after a stop and a resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lora.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.distributed.world import World
from lora.errors import ConfigError, Interrupted
from lora.runs.disk import read_json, read_rows
from lora.runs.interrupts import StopRequests
from lora.runs.sweep_record import SweepRecord, read_sweep_record
from lora.sweep import SweepJob, run, sweep
from lora.sweep.grid import Grid
from lora.sweep.progress import NoSweepProgress
from tests.distributed.processes import run_processes
from tests.integration.test_devices import end, errors, ranks, wait_until

STEPS = 8
DATA = DataConfig(max_length=128, packing=False)


class StopAfter(StopRequests):
    """A signal that comes while a step of this process is taken."""

    steps = 10**6

    def __init__(self, on_message: Any) -> None:
        super().__init__(on_message)
        self._left = self.steps

    @property
    def received(self) -> Any:  # type: ignore[override]
        self._left -= 1
        return signal.SIGTERM if self._left < 0 else None

    @received.setter
    def received(self, value: object) -> None:
        pass


class Kept(NoSweepProgress):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, message: str) -> None:
        self.messages.append(message)


@pytest.fixture
def job(tiny_folder: Path, tmp_path: Path) -> SweepJob:
    return SweepJob(
        data=make_orders("train", 24),
        grid=Grid(rank=(2, 4), learning_rate=(5e-3, 1e-2, 1e30)),
        model=str(tiny_folder),
        lora=LoRAConfig(dropout=0.1),
        train=TrainConfig(steps=STEPS, batch_size=4),
        data_config=DATA,
        run=RunConfig(out=tmp_path, name="alone", eval_every_steps=2, save_every_steps=2),
        halving=True,
    )


def stopped(job: SweepJob, steps: int) -> str:
    """Run a sweep that a signal stops; return what it says."""
    former = run.StopRequests
    run.StopRequests = type("Stop", (StopAfter,), {"steps": steps})  # type: ignore[misc]
    try:
        with pytest.raises(Interrupted) as caught:
            sweep(job)
    finally:
        run.StopRequests = former  # type: ignore[misc]
    return str(caught.value)


def named(job: SweepJob, name: str, *, resume: bool = False) -> SweepJob:
    return replace(job, run=replace(job.run, name=name), resume=resume)


def shared_sweeps(world: World, job: SweepJob) -> dict[str, Any]:
    """Run the sweeps of this module in one of two processes."""
    progress = Kept()
    done = sweep(named(job, "shared"), progress)
    found: dict[str, Any] = {
        "best": done.best,
        "ranked": [c.name for c in done.candidates],
        "messages": progress.messages,
        "stopped": stopped(named(job, "again"), 2 if world.is_main else 1),
    }
    sweep(named(job, "again", resume=True))
    sweep(named(job, "from-one", resume=True))
    stopped(named(job, "to-one"), 2)
    try:
        sweep(replace(named(job, "other"), data=make_orders("train", 24 + world.rank)))
    except ConfigError as error:
        found["refused"] = str(error)
    return found


def test_two_processes_sweep_as_one_does(job: SweepJob, tmp_path: Path) -> None:
    alone = sweep(job)
    stopped(named(job, "from-one"), 5)
    first, second = run_processes(2, shared_sweeps, job)
    assert (first["best"], first["ranked"]) == (second["best"], second["ranked"])
    assert first["ranked"] == [c.name for c in alone.candidates]
    sweep(named(job, "to-one", resume=True))
    for name in ("shared", "again", "from-one", "to-one"):
        check_same(tmp_path / "alone", tmp_path / name)
    whole = results(tmp_path / "shared")
    assert results(tmp_path / "again") == whole  # to the byte: each process had its candidates
    assert "rank 1: 006-rank4-rate1e30 failed: " in "\n".join(first["messages"])
    assert "after step 2 of a wave of 3 candidates" in first["stopped"]
    assert "data: " in first["refused"]
    assert first["refused"] == second["refused"]
    assert not (tmp_path / "other").exists()
    record = read_json(tmp_path / "shared" / "run.json")
    assert (record["world_size"], record["at_once"]) == (2, 3)
    timings = read_rows(tmp_path / "shared" / "timings.jsonl")
    assert [row["rank"] for row in timings] == [0, 1, 0, 1, 0][: len(timings)]


def small_sweep(world: World, job: SweepJob) -> list[str]:
    progress = Kept()
    sweep(job, progress)
    return progress.messages


def test_a_process_without_a_candidate_waits_for_the_others(job: SweepJob, tmp_path: Path) -> None:
    two = replace(job, grid=Grid(rank=(2, 4)), halving=False, train=TrainConfig(steps=2))
    messages, *others = run_processes(3, small_sweep, two)
    assert "note: 1 of 3 processes have nothing to train: there are 2 candidates" in messages
    assert others == [[], []]
    assert [c.status for c in record_of(tmp_path / "alone").candidates] == ["done", "done"]
    timings = read_rows(tmp_path / "alone" / "timings.jsonl")
    assert [row["rank"] for row in timings] == [0, 1]


def results(folder: Path) -> dict[str, bytes]:
    kinds = ("candidates/*/metrics.jsonl", "candidates/*/adapter/*", "best/*", "sweep.json")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for kind in kinds
        for path in folder.glob(kind)
    }


def check_same(alone: Path, shared: Path) -> None:
    """Check that two sweeps come to the same, within rounding."""
    expected, found = record_of(alone), record_of(shared)
    assert found.rungs == expected.rungs
    assert found.base_eval_loss == expected.base_eval_loss
    for own, wanted in zip(found.candidates, expected.candidates, strict=True):
        same = ("name", "settings", "status", "step", "stopped_at", "best_step", "row")
        assert [vars(own)[n] for n in same] == [vars(wanted)[n] for n in same]
        if wanted.eval_loss is not None:
            assert own.eval_loss == pytest.approx(wanted.eval_loss, rel=1e-4)
    for folder in sorted((alone / "candidates").iterdir()):
        other = shared / "candidates" / folder.name
        rows, wanted = (read_rows(path / "metrics.jsonl") for path in (other, folder))
        assert [(row.keys(), row["step"]) for row in rows] == [
            (row.keys(), row["step"]) for row in wanted
        ]
        assert not (other / "state").exists()
        if not (folder / "adapter").is_dir():
            assert not (other / "adapter").is_dir()
            continue
        tensors, plain = (
            load_file(path / "adapter" / "adapter_model.safetensors") for path in (other, folder)
        )
        for name, tensor in plain.items():
            assert (tensors[name] - tensor).norm() <= 1e-3 * tensor.norm(), (folder.name, name)
    assert read_json(shared / "result.json")["best"] == read_json(alone / "result.json")["best"]
    assert not list(shared.glob("checkpoints*"))


def record_of(folder: Path) -> SweepRecord:
    record = read_sweep_record(folder)
    assert record is not None
    return record


def start_two(model: Path, data: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """Start the command in two processes."""
    words = (
        f"sweep --data {data} --model {model} --out {out} --rank 2,4 --learning-rate 5e-3,1e-2 "
        "--steps 60 --batch-size 4 --max-length 128 --eval-every-steps 10 --save-every-steps 3 "
        "--device cpu --devices 2 --no-report"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    return subprocess.Popen(
        [sys.executable, "-m", "lora", *words.split(), *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def rows_in(candidates: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in candidates.glob("*/metrics.jsonl"))


@pytest.mark.slow
def test_a_sweep_that_is_stopped_and_killed_ends_as_one_that_is_not(
    tiny_folder: Path, orders_file: Path, tmp_path: Path
) -> None:
    inputs, candidates = (tiny_folder, orders_file, tmp_path), tmp_path / "killed" / "candidates"
    end(start_two(*inputs, "--name", "whole"), 0)
    process = start_two(*inputs, "--name", "killed")
    wait_until(lambda: rows_in(candidates) > 40, process)
    process.send_signal(signal.SIGTERM)
    _, said = end(process, 143)
    assert errors(said) == [line for line in said.splitlines() if "its state is saved" in line]
    assert len(errors(said)) == 1
    rows = rows_in(candidates)
    process = start_two(*inputs, "--name", "killed", "--resume")
    wait_until(lambda: rows_in(candidates) > rows + 40, process)
    os.kill(ranks(process)[1], signal.SIGKILL)
    _, said = end(process, 137)
    assert "lora: rank 1 was ended by SIGKILL" in said
    out, _ = end(start_two(*inputs, "--name", "killed", "--resume", "--json"), 0)
    assert json.loads(out)["best"] == str(tmp_path / "killed" / "best")
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
