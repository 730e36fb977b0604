"""A sweep through the fast stacked step, on a CPU with plain operations, read one step late."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lora.config import DataConfig, RunConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.fast import stacked_runner
from lora.fast.stacked_runner import FastStackedRunner
from lora.runs.sweep_record import CandidateState
from lora.sweep import SweepJob, sweep
from lora.sweep.grid import Grid
from lora.sweep.progress import NoSweepProgress


class Killed(Exception):
    """Simulates a kill."""


class KilledAt(NoSweepProgress):
    """Raises Killed after `step` steps."""

    def __init__(self, step: int) -> None:
        self.left = step

    def step(self, title: str, states: Sequence[CandidateState]) -> None:
        self.left -= 1
        if not self.left:
            raise Killed


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the fast stacked step on the CPU, read one step late as on a GPU."""
    monkeypatch.setattr(stacked_runner, "why_not_stacked", lambda *_: None)
    begin = FastStackedRunner.__init__

    def late(self: FastStackedRunner, *values: object) -> None:
        begin(self, *values)  # type: ignore[arg-type]
        self.late_steps = 1

    monkeypatch.setattr(FastStackedRunner, "__init__", late)


@pytest.fixture
def job(tiny_folder: Path, tmp_path: Path) -> SweepJob:
    return SweepJob(
        data=make_orders("train", 32),
        grid=Grid(rank=(2, 4), learning_rate=(5e-3, 1e-2)),
        model=str(tiny_folder),
        train=TrainConfig(steps=12, batch_size=4, gradient_accumulation=2),
        data_config=DataConfig(max_length=128),
        run=RunConfig(out=tmp_path, name="whole", eval_every_steps=4, save_every_steps=3),
        at_once=3,
    )


def named(job: SweepJob, name: str, **settings: object) -> SweepJob:
    run = replace(job.run, name=name, **settings)  # type: ignore[arg-type]
    return replace(job, run=run)


def files(folder: Path) -> dict[str, bytes]:
    found = sorted((folder / "candidates").glob("*/*.jsonl"))
    found += sorted((folder / "candidates").glob("*/adapter/*.safetensors"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_waves_and_halving_end_as_with_the_plain_step(job: SweepJob, fast: None) -> None:
    done = sweep(job)
    plain = sweep(named(job, "plain", fast=False))
    losses = {candidate.name: candidate.eval_loss for candidate in plain.candidates}
    for candidate in done.candidates:
        assert (candidate.status, candidate.step, candidate.row) == ("done", 12, 48)
        assert candidate.eval_loss == pytest.approx(losses[candidate.name], rel=1e-4)
        tensors, others = (
            load_file(
                run.folder / "candidates" / candidate.name / "adapter/adapter_model.safetensors"
            )
            for run in (done, plain)
        )
        for key, tensor in tensors.items():
            assert (tensor - others[key]).norm() <= 2e-3 * others[key].norm(), key
    names = {path.rsplit("/", 1)[0] for path in files(done.folder)}
    assert names == {path.rsplit("/", 1)[0] for path in files(plain.folder)}


def test_a_killed_sweep_is_resumed_to_the_same_bytes(job: SweepJob, fast: None) -> None:
    whole = sweep(job)
    killed = named(job, "killed")
    with pytest.raises(Killed):
        sweep(killed, KilledAt(8))
    with pytest.raises(Killed):
        sweep(replace(killed, resume=True), KilledAt(9))  # in the second wave
    again = sweep(replace(killed, resume=True))
    assert files(again.folder) == files(whole.folder)


def test_a_killed_sweep_over_nf4_is_resumed_to_the_same_bytes(job: SweepJob, fast: None) -> None:
    train = replace(job.train, steps=6)
    grid = Grid(rank=(2, 4))
    job = replace(job, grid=grid, train=train, base_dtype="nf4", nf4_block=32, at_once=1)
    whole = sweep(job)
    killed = named(job, "killed")
    with pytest.raises(Killed):
        sweep(killed, KilledAt(10))  # in the second wave
    assert files(sweep(replace(killed, resume=True)).folder) == files(whole.folder)


def test_a_failed_candidate_does_not_stop_the_others(job: SweepJob, fast: None) -> None:
    grid = Grid(learning_rate=(5e-3, 1e30, 1e-2))
    done = sweep(replace(job, grid=grid))
    by_rate = {candidate.settings["learning_rate"]: candidate for candidate in done.candidates}
    assert by_rate[1e30].status == "failed"
    assert "not finite" in by_rate[1e30].reason
    assert by_rate[5e-3].status == by_rate[1e-2].status == "done"
    assert by_rate[1e-2].step == 12
