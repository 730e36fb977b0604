"""A sweep: each candidate as it would be alone, waves, halving, resume, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora.cli import main
from lora.compare.sweep_full import _full_job, sweep_with_full
from lora.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.errors import CheckpointError, ConfigError, Interrupted, TrainingError
from lora.finetune import FinetuneJob, finetune
from lora.report import report_on
from lora.runs.disk import read_json, read_rows
from lora.runs.sweep_record import CandidateState, rank
from lora.sweep import SweepJob, sweep
from lora.sweep.grid import Grid, build_candidates
from lora.sweep.progress import NoSweepProgress

TRAIN = TrainConfig(steps=12, batch_size=4)
DATA = DataConfig(max_length=128, packing=False)


@pytest.fixture
def job(tiny_folder: Path, tmp_path: Path) -> SweepJob:
    return SweepJob(
        data=make_orders("train", 32),
        grid=Grid(rank=(2, 4), learning_rate=(5e-3, 1e-2)),
        model=str(tiny_folder),
        train=TRAIN,
        data_config=DATA,
        run=RunConfig(out=tmp_path, name="sweep", eval_every_steps=4),
    )


def adapters(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    found = sorted((folder / "candidates").iterdir())
    return {p.name: load_file(p / "adapter" / "adapter_model.safetensors") for p in found}


def test_each_candidate_is_what_finetune_makes_and_the_best_is_chosen(job: SweepJob) -> None:
    done = sweep(job)
    page = report_on(done.folder, print)
    together = adapters(done.folder)
    assert len(together) == 4
    losses = {}
    for name, tensors in together.items():
        settings = read_json(done.folder / "candidates" / name / "run.json")
        lora, train = LoRAConfig(**settings["lora"]), TrainConfig(**settings["train"])
        one = FinetuneJob(
            data=job.data, model=job.model, lora=lora, train=train, data_config=DATA,
            run=RunConfig(out=job.run.out, name=name, eval_every_steps=4, samples=0),
        )  # fmt: skip
        alone = finetune(one)
        expected = load_file(alone.saved / "adapter_model.safetensors")
        assert tensors.keys() == expected.keys()
        for key, tensor in tensors.items():
            assert (tensor - expected[key]).norm() <= 1e-3 * expected[key].norm(), (name, key)
        rows = read_rows(done.folder / "candidates" / name / "metrics.jsonl")
        losses[name] = [row["eval_loss"] for row in rows if "eval_loss" in row][-1]
        assert losses[name] == pytest.approx(alone.result.eval_loss, rel=1e-4)
        (state,) = (s for s in done.candidates if s.name == name)
        assert state.saved_step == alone.result.saved_step
        assert state.saved_eval_loss == pytest.approx(alone.result.saved_eval_loss, rel=1e-4)
    best = min(losses, key=lambda name: losses[name])
    chosen = load_file(done.best / "adapter_model.safetensors")
    assert all(torch.equal(chosen[key], tensor) for key, tensor in together[best].items())
    assert done.candidates[0].name == best
    assert (done.folder / "loss.png").stat().st_size > 1000
    assert page == done.folder / "report.html"
    told = read_json(done.folder / "report.json")
    assert [r["name"] for r in told["runs"]] == [f"sweep/{s.name}" for s in done.candidates]
    assert {r["eval_loss"] for r in told["runs"]} == set(losses.values())
    assert told["sweeps"][0]["best"] == f"sweep/{best}"
    assert told["runs"][0]["total_parameters"] > told["runs"][0]["trainable_parameters"] > 0


def test_fully_trained_embeddings_are_what_finetune_makes(job: SweepJob) -> None:
    lora = LoRAConfig(rank=2, modules_to_save=("embed_tokens",))
    job = replace(job, lora=lora, grid=Grid(rank=(2, 4), learning_rate=(5e-3,)))
    together = adapters(sweep(job).folder)["001-rank2"]
    alone = finetune(
        FinetuneJob(
            data=job.data, model=job.model, data_config=DATA,
            lora=lora, train=replace(TRAIN, learning_rate=5e-3),
            run=RunConfig(out=job.run.out, name="alone", eval_every_steps=4, samples=0),
        )
    )  # fmt: skip
    expected = load_file(alone.saved / "adapter_model.safetensors")
    assert any(name.endswith("embed_tokens.weight") for name in expected)
    assert together.keys() == expected.keys()
    for key, tensor in together.items():
        assert (tensor - expected[key]).norm() <= 1e-3 * expected[key].norm(), key


@pytest.mark.slow
def test_mixed_candidates_are_as_alone_over_fifty_steps(job: SweepJob) -> None:
    grid = Grid(rank=(2, 4), alpha=(8.0, "2r"), dropout=(0.0, 0.1), seed=(0, 1))
    train, eval_data = replace(TRAIN, steps=50), make_orders("validation", 8)
    job = replace(job, grid=grid, train=train, eval_data=eval_data)
    done = sweep(job)
    for name, tensors in adapters(done.folder).items():
        settings = read_json(done.folder / "candidates" / name / "run.json")
        alone = finetune(
            FinetuneJob(
                data=job.data, model=job.model, eval_data=eval_data, data_config=DATA,
                lora=LoRAConfig(**settings["lora"]), train=TrainConfig(**settings["train"]),
                run=RunConfig(out=job.run.out, name=name, eval_every_steps=25, samples=0),
            )
        )  # fmt: skip
        expected = load_file(alone.saved / "adapter_model.safetensors")
        for key, tensor in tensors.items():
            assert (tensor - expected[key]).norm() <= 5e-3 * expected[key].norm(), (name, key)


def test_waves_end_where_one_wave_ends(job: SweepJob) -> None:
    at_once = sweep(job)
    run = replace(job.run, name="waves")
    waves = sweep(replace(job, run=run, at_once=3))
    others = adapters(waves.folder)
    for name, tensors in adapters(at_once.folder).items():
        for key, tensor in tensors.items():
            assert (tensor - others[name][key]).norm() <= 1e-3 * tensor.norm(), (name, key)


def test_halving_stops_the_worse_and_keeps_the_best(job: SweepJob) -> None:
    done = sweep(replace(job, halving=True))
    ended = [candidate.status for candidate in done.candidates]
    assert ended.count("stopped") >= 2
    assert done.candidates[0].status == "done"


class Stopping(NoSweepProgress):
    """Sends Ctrl-C at one step."""

    def __init__(self, at_step: int) -> None:
        self.said: list[str] = []
        self._at_step = at_step

    def message(self, message: str) -> None:
        self.said.append(message)

    def step(self, title: str, states: list[CandidateState]) -> None:
        if states[0].step == self._at_step:
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_wave_is_resumed_in_smaller_ones(job: SweepJob) -> None:
    """As is needed when memory runs out."""
    whole = sweep(replace(job, run=replace(job.run, name="whole")))
    with pytest.raises(Interrupted):
        sweep(job, Stopping(5))
    heard = Stopping(0)
    done = sweep(replace(job, at_once=3, resume=True), heard)
    assert any("splitting the wave of 4 that was at step 5" in line for line in heard.said)
    others = adapters(done.folder)
    for name, tensors in adapters(whole.folder).items():
        for key, tensor in tensors.items():
            assert (tensor - others[name][key]).norm() <= 1e-3 * tensor.norm(), (name, key)
        rows = read_rows(done.folder / "candidates" / name / "metrics.jsonl")
        assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))


def test_a_resumed_sweep_keeps_its_number_at_once(
    job: SweepJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Interrupted):
        sweep(replace(job, at_once=3), Stopping(5))
    heard = Stopping(0)
    sweep(replace(job, resume=True), heard)  # all four would fit
    assert any("3 at once, 2 waves" in line for line in heard.said)


def test_memory_that_runs_out_names_the_plan_and_smaller_waves(
    job: SweepJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("lora.sweep.wave_loop.stack_batches", refuse)
    with pytest.raises(TrainingError) as caught:
        sweep(job)
    for words in (
        "with 4 candidates at once",
        "GB for each",
        "--at-once 2",
        "--gradient-accumulation",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize("text", ["[]", '{"candidates": []}', '{"candidates": [{"name": 1}]}', "{"])
def test_a_damaged_sweep_record_is_refused(job: SweepJob, text: str) -> None:
    with pytest.raises(Interrupted):
        sweep(job, Stopping(2))
    (job.run.out / "sweep" / "sweep.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"sweep\.json"):
        sweep(replace(job, resume=True))


def test_a_sweep_takes_epochs_and_a_resume_keeps_its_steps(job: SweepJob) -> None:
    train = replace(job.train, steps=None, epochs=0.1)
    done = sweep(replace(job, train=train))
    record = read_json(done.folder / "run.json")
    steps = record["sweep"]["steps"]
    assert steps == -(-record["data"]["rows"] // (10 * train.batch_size))
    assert all(state.step == steps for state in done.candidates)
    again = sweep(replace(job, resume=True, train=replace(train, epochs=None)))
    assert all(state.step == steps for state in again.candidates)
    with pytest.raises(CheckpointError, match=f"steps: {steps} then"):
        sweep(replace(job, resume=True, train=replace(train, epochs=5.0)))


def test_another_grid_is_not_resumed(job: SweepJob) -> None:
    sweep(job)
    changed = replace(job, grid=Grid(rank=(2, 8)), resume=True)
    with pytest.raises(CheckpointError, match="rank"):
        sweep(changed)
    with pytest.raises(CheckpointError, match="save: best then, last now"):
        sweep(replace(job, run=replace(job.run, save="last"), resume=True))


@pytest.mark.parametrize("words", [("0",), ("a", 4), (4, 4)])
def test_values_that_cannot_be_used_are_named(words: tuple[str | int, ...]) -> None:
    with pytest.raises(ConfigError, match="rank"):
        build_candidates(Grid(rank=words), LoRAConfig(), TRAIN)


def test_the_command_refuses_without_a_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["sweep", "--data", str(tmp_path / "none.jsonl"), "--rank", "2,x"]) == 2
    assert "rank" in capsys.readouterr().err


def test_full_fine_tuning_joins_the_sweep_and_is_what_finetune_makes(job: SweepJob) -> None:
    done, full = sweep_with_full(job, NoSweepProgress(), 2e-3)
    assert full.record.candidate.settings["learning_rate"] == 2e-3
    assert full.record.candidate.step == TRAIN.steps
    assert full.record.peak_memory_bytes > 1e8
    alone = finetune(
        FinetuneJob(
            data=job.data, model=job.model, lora=None, data_config=DATA,
            train=replace(TRAIN, learning_rate=2e-3),
            run=RunConfig(out=job.run.out, name="alone", eval_every_steps=4, samples=0),
        )
    )  # fmt: skip
    file = Path("model") / "model.safetensors"
    assert (full.folder / file).read_bytes() == (alone.folder / file).read_bytes()
    before = (full.folder / file).stat().st_mtime_ns
    values = read_json(done.folder / "full.json")  # as the version before wrote it
    values["standing"] = values.pop("candidate")
    del values["schema_version"]
    (done.folder / "full.json").write_text(json.dumps(values))
    _, again = sweep_with_full(replace(job, resume=True), NoSweepProgress(), 2e-3)
    assert again == full
    assert (full.folder / file).stat().st_mtime_ns == before
    ranked = rank([*done.candidates, full.record.candidate])
    losses = [candidate.eval_loss for candidate in ranked]
    assert losses == sorted(losses)  # type: ignore[type-var]
    unnamed = replace(job, train=replace(TRAIN, steps=None), deterministic=True)
    resumed = _full_job(unnamed, done.folder, None)  # a sweep resumed without its steps
    assert (resumed.train.steps, resumed.deterministic) == (TRAIN.steps, True)


@pytest.mark.parametrize("settings", [{"patience": 2}, {"tensorboard": True}])
def test_what_a_sweep_has_no_use_for_is_refused(job: SweepJob, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"Cannot sweep with {next(iter(settings))}"):
        sweep(replace(job, run=replace(job.run, **settings)))
    assert not (job.run.out / "sweep").exists()


def test_the_command_shows_full_fine_tuning_in_the_table(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "orders.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in make_orders("train", 32)))
    words = f"sweep --data {file} --model {tiny_folder} --out {tmp_path} --rank 2,4 --steps 3"
    assert main([*words.split(), "--max-length", "128", "--name", "run", "--full"]) == 0
    out = capsys.readouterr().out
    assert "full fine-tuning" in out
    assert "│ full │" in out
    assert main([*words.split(), "--full-learning-rate", "1e-4"]) == 2
    assert "--full" in capsys.readouterr().err


def start(tiny_folder: Path, file: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    words = f"sweep --data {file} --model {tiny_folder} --out {out} --name run --rank 2,4"
    words += " --learning-rate 5e-3,1e-2 --dropout 0.1 --steps 50 --batch-size 4 --at-once 3"
    words += " --max-length 128 --eval-every-steps 10 --save-every-steps 3 --device cpu"
    return subprocess.Popen(
        [sys.executable, "-m", "lora", *words.split(), *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said


def results(folder: Path) -> dict[str, bytes]:
    names = ("metrics.jsonl", "sweep.json", "adapter_model.safetensors")
    files = [path for path in folder.rglob("*") if path.name in names]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


def kill(process: subprocess.Popen[str], run: Path, draw: random.Random, *, in_save: bool) -> str:
    """Kill the process some steps later, or during a save; return which it was."""

    def is_saving() -> bool:
        return any((run / "checkpoints").glob(".step-*.building"))

    def count_rows() -> int:
        files = (run / "candidates").glob("*/metrics.jsonl")
        return sum(file.read_bytes().count(b'"loss"') for file in files)

    begin, target = count_rows(), draw.randrange(4, 30)
    while process.poll() is None:
        if in_save and is_saving() and draw.random() < 0.5:
            break
        if not in_save and count_rows() not in range(begin - 9, begin + target):
            break
        time.sleep(draw.random() * 0.001)
    hit = "save" if is_saving() else "step"
    process.kill()
    process.communicate()
    return hit if process.returncode == -signal.SIGKILL else "end"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("halving", [False, True], ids=["waves", "halving"])
def test_kill_9_at_eight_random_moments_changes_no_byte(
    tiny_folder: Path, tmp_path: Path, halving: bool
) -> None:
    """One sweep of two waves, killed eight times, four of them during a save."""
    more = ("--halving",) if halving else ()
    file = tmp_path / "orders.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in make_orders("train", 32)))
    finish(start(tiny_folder, file, tmp_path / "whole", *more))
    out, draw, hits = tmp_path / "killed", random.Random(str(more)), []
    for number in range(8):
        process = start(tiny_folder, file, out, *more, *(("--resume",) if number else ()))
        hits.append(kill(process, out / "run", draw, in_save=number % 2 == 1))
    finish(start(tiny_folder, file, out, *more, "--resume"))
    expected = results(tmp_path / "whole" / "run")
    assert len(expected) == 10, sorted(expected)  # of four candidates, the best and the ledger
    assert results(out / "run") == expected, hits
    assert hits.count("save") >= 2, hits
    assert hits.count("step") >= 2, hits


def test_a_disk_that_fills_while_the_best_is_copied_loses_no_candidate(
    job: SweepJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", refuse)
        with pytest.raises(CheckpointError, match=r"No space left.*All candidates are trained"):
            sweep(job)
    assert not list(job.run.out.glob("sweep/*best*"))
    done = sweep(replace(job, resume=True))
    assert (done.best / "adapter_model.safetensors").is_file()
