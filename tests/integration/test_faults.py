"""Real processes of `lora finetune`, killed, stopped and starved of disk."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.data.tokenizers.subword import load_tokenizer
from lora.errors import CheckpointError, TrainingError
from lora.finetune import FinetuneJob, finetune
from lora.runs.directory import create_run
from lora.runs.disk import read_json, read_rows
from lora.runs.progress import NoProgress
from lora.runs.record import MetricsRow
from lora.training.checkpoint import list_checkpoints
from lora.training.losses import loss_for

STEPS = 50
BYTES = ("metrics.jsonl", "samples.jsonl")


def start(
    tiny_folder: Path, orders_file: Path, out: Path, kind: str, *more: str, data_threads: int = 1
) -> subprocess.Popen[str]:
    words = (
        f"finetune --data {orders_file} --model {tiny_folder} --out {out} --name run --device cpu"
    )
    words += f" --steps {STEPS} --batch-size 4 --eval-every-steps 10 --save-every-steps 3"
    words += " --max-length 128 --samples 1 --sample-tokens 4"
    words += " --full" if kind == "full" else " --rank 4 --dropout 0.1"
    return subprocess.Popen(
        [sys.executable, "-m", "lora", *words.split(), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": str(data_threads)},
    )


def finish(process: subprocess.Popen[str]) -> str:
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return said


def results(folder: Path, kind: str) -> dict[str, bytes]:
    weights = "model/model.safetensors" if kind == "full" else "adapter/adapter_model.safetensors"
    return {name: (folder / name).read_bytes() for name in (weights, *BYTES)}


def kill_at_random(process: subprocess.Popen[str], run: Path, draw: random.Random) -> str:
    """Wait for a random step, or for a save to begin, and kill; return what was hit."""
    metrics, checkpoints = run / "metrics.jsonl", run / "checkpoints"
    waits_for_save, target = draw.random() < 0.4, draw.randrange(1, STEPS)

    def is_due() -> bool:
        if waits_for_save:
            return any(checkpoints.glob(".step-*.building")) and draw.random() < 0.3
        return metrics.is_file() and metrics.read_bytes().count(b"gradient_norm") >= target

    while process.poll() is None and not is_due():
        time.sleep(draw.random() * 0.003)
    hit = "save" if list(checkpoints.glob(".step-*.building")) else "step"
    process.kill()
    process.communicate()
    return hit


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_kill_9_at_ten_random_moments_changes_no_byte(
    tiny_folder: Path, orders_file: Path, tmp_path: Path, kind: str
) -> None:
    """Ten moments each for LoRA and full fine-tuning; each run is killed, resumed and compared.

    The resumed one prepares its data with another number of threads.
    """
    finish(start(tiny_folder, orders_file, tmp_path / "whole", kind))
    expected = results(tmp_path / "whole" / "run", kind)
    draw, hits = random.Random(kind), []
    for number in range(10):
        out = tmp_path / f"killed-{number}"
        hits.append(kill_at_random(start(tiny_folder, orders_file, out, kind), out / "run", draw))
        threads = 2 + number % 3
        finish(start(tiny_folder, orders_file, out, kind, "--resume", data_threads=threads))
        assert results(out / "run", kind) == expected, (number, hits)
    assert "save" in hits
    assert "step" in hits


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.slow
def test_a_signal_saves_between_steps_and_the_run_goes_on_to_the_same_bytes(
    tiny_folder: Path, orders_file: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    finish(start(tiny_folder, orders_file, tmp_path / "whole", "lora"))
    process = start(tiny_folder, orders_file, tmp_path, "lora")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < 8:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    last = read_rows(metrics)[-1]["step"]
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == f"step-{last:06d}"
    assert f"step {last} is saved" in " ".join(said.split())
    finish(start(tiny_folder, orders_file, tmp_path, "lora", "--resume"))
    assert results(tmp_path / "run", "lora") == results(tmp_path / "whole" / "run", "lora")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.slow
def test_a_second_signal_leaves_at_once_and_loses_no_byte(
    tiny_folder: Path, orders_file: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """An evaluation that takes long stands between the first signal and the run's end."""
    slow = ("--eval-data", str(long_file(tmp_path)))
    process = start(tiny_folder, orders_file, tmp_path, "lora", *slow)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_bytes().count(b"gradient_norm") < 10:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)  # it evaluates step 10
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(number)
    began_s = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - began_s < 5
    assert process.returncode == code, said
    assert "a second one exits at once" in " ".join(said.split())
    assert "Traceback" not in said
    finish(start(tiny_folder, orders_file, tmp_path, "lora", *slow, "--resume"))
    finish(start(tiny_folder, orders_file, tmp_path / "whole", "lora", *slow))
    assert results(tmp_path / "run", "lora") == results(tmp_path / "whole" / "run", "lora")


def long_file(folder: Path) -> Path:
    """Return examples whose evaluation takes seconds."""
    path = folder / "held_out.jsonl"
    rows = make_orders("train", 800)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Heard(NoProgress):
    """Keeps what was said, and does something at one step."""

    def __init__(self, at_step: int = 0, do: Any = None) -> None:
        self.said: list[str] = []
        self._at_step, self._do = at_step, do

    def message(self, message: str) -> None:
        self.said.append(message)

    def step(self, step: int, loss: float, tokens_per_s: float, memory_bytes: int) -> None:
        if step == self._at_step:
            self._do()


@pytest.fixture
def job(tiny_folder: Path, tmp_path: Path) -> FinetuneJob:
    return FinetuneJob(
        data=make_orders("train", 24),
        model=str(tiny_folder),
        lora=LoRAConfig(rank=4),
        train=TrainConfig(steps=12, batch_size=4, learning_rate=2e-2),
        data_config=DataConfig(max_length=128),
        run=RunConfig(out=tmp_path, name="run", save_every_steps=3, samples=0, device="cpu"),
    )


def test_a_disk_that_is_full_for_a_while_costs_no_row_and_no_step(
    job: FinetuneJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finetune(replace(job, run=replace(job.run, name="whole")))
    sync, is_full = os.fsync, [False]

    def refuse(handle: int) -> None:
        if is_full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", refuse)

    class Filling(Heard):
        def step(self, step: int, loss: float, tokens_per_s: float, memory_bytes: int) -> None:
            is_full[0] = 5 <= step <= 7  # the save of step 6 meets it

    heard = Filling()
    done = finetune(job, heard)
    told = [line for line in heard.said if "No space left" in line]
    assert len(told) == 1
    assert "newest checkpoint is step 3; the next save tries again" in told[0]
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (done.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_rows_wait_in_memory_while_they_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    with create_run(tmp_path, "run") as run:
        run.on_trouble = told.append
        run.append_metrics(MetricsRow(1))
        away = run.folder.rename(tmp_path / "away")
        run.append_metrics(MetricsRow(2))
        run.append_metrics(MetricsRow(3))
        assert len(told) == 1
        assert "no longer exists" in told[0]
        with pytest.raises(CheckpointError, match="no longer exists"):
            run.sync()
        away.rename(run.folder)
        run.append_metrics(MetricsRow(4))
        assert [row.step for row in run.read_metrics()] == [1, 2, 3, 4]


def test_a_vanished_folder_is_told_and_the_adapter_is_saved_all_the_same(
    job: FinetuneJob, tmp_path: Path
) -> None:
    heard = Heard(4, lambda: shutil.rmtree(tmp_path / "run"))
    done = finetune(job, heard)
    assert any("no longer exists" in line for line in heard.said)
    assert (done.saved / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_what_was_learned_goes_elsewhere_if_the_disk_has_no_room_at_the_end(
    job: FinetuneJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    job = replace(job, lora=None if full else job.lora)
    whole = finetune(replace(job, run=replace(job.run, name="whole")))
    sync, heard = os.fsync, Heard(12, lambda: is_full.append(True))
    is_full: list[bool] = []

    def refuse(handle: int) -> None:
        if is_full and str(Path(f"/proc/self/fd/{handle}").readlink()).startswith(str(runs)):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    runs = tmp_path / "run"
    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    done = finetune(job, heard)
    name = "model.safetensors" if full else "adapter_model.safetensors"
    assert (done.saved / name).read_bytes() == (whole.saved / name).read_bytes()
    assert done.saved.parent.name.startswith("lora-run-")
    assert any(f"is saved in {done.saved}" in line for line in heard.said)
    assert sum("The newest checkpoint is step 10" in line for line in heard.said) == 1
    assert not list((runs / done.saved.name).glob(".*"))


def test_a_disk_that_is_full_at_the_end_ends_the_command_with_2(
    tiny_folder: Path,
    orders_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lora.cli import main
    from lora.finetune import model

    save = model.save_adapter
    full = [tmp_path / "runs", tmp_path / "temporary"]
    (tmp_path / "temporary").mkdir()

    def refuse(adapted: Any, folder: Path, **given: Any) -> None:
        if any(place in folder.parents for place in full):
            raise CheckpointError(f"Cannot write {folder}: No space left on device.")
        save(adapted, folder, **given)

    monkeypatch.setattr(model, "save_adapter", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(tiny_folder), "--out", str(tmp_path / "runs"), "--name", "run"]
    words += ["--steps", "2", "--batch-size", "2", "--samples", "0", "--no-report"]
    assert main(["finetune", str(orders_file), *words]) == 2
    seen = capsys.readouterr().err
    (saved,) = tmp_path.glob("lora-run-*/adapter")
    assert (saved / "adapter_model.safetensors").is_file()
    assert f"It is saved in {saved} instead" in " ".join(seen.split())
    assert not list((tmp_path / "temporary").iterdir())
    full.append(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(
        model, "save_adapter", lambda *_, **__: refuse(None, tmp_path / "runs" / "x")
    )
    assert main(["finetune", str(orders_file), *words]) == 2
    assert "could not be saved in" in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def spoilt_losses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the training batches whose loss is NaN."""
    spoilt: list[int] = []
    count = [0]

    def build(model: torch.nn.Module) -> Any:
        inner = loss_for(model)

        def loss(model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
            total, n_tokens = inner(model, batch)
            if model.training and torch.is_grad_enabled():
                count[0] += 1
                if count[0] in spoilt:
                    total = total * math.nan
            return total, n_tokens

        return loss

    monkeypatch.setattr("lora.fast.choose.loss_for", build)
    return spoilt


def test_steps_that_are_not_finite_are_left_out_up_to_the_limit(
    job: FinetuneJob, spoilt_losses: list[int]
) -> None:
    spoilt_losses.append(5)
    heard = Heard()
    done = finetune(replace(job, run=replace(job.run, skip_nonfinite=1)), heard)
    rows = read_rows(done.folder / "metrics.jsonl")
    assert [row for row in rows if "skipped" in row] == [{"skipped": 1, "step": 5}]
    assert any("Skipped: 1 of at most 1" in line for line in heard.said)
    assert done.result.steps == 12


def test_the_first_one_over_the_limit_stops_the_run(
    job: FinetuneJob, spoilt_losses: list[int]
) -> None:
    spoilt_losses.append(5)
    with pytest.raises(TrainingError, match=r"Step 5 of 12.*not finite"):
        finetune(job)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_examples_layer_and_step_are_named(
    job: FinetuneJob, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """An example of which one word makes the first layer's output NaN is found among 24."""
    damaged = job.data[6]["messages"][-1]["content"]

    def build(model: torch.nn.Module) -> Any:
        def spoil(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            (ids,) = inputs
            texts = [tokenizer.backend.decode(row) for row in ids.tolist()]
            hit = torch.tensor([damaged in text for text in texts])
            return output.masked_fill(hit[:, None, None], math.nan) if module.training else output

        model.get_submodule("model.embed_tokens").register_forward_hook(spoil)
        return loss_for(model)

    tokenizer = load_tokenizer(Path(str(job.model)))
    monkeypatch.setattr("lora.fast.choose.loss_for", build)
    config = replace(job.data_config, packing=False, eval_fraction=0.0)
    job = replace(job, data_config=config, lora=None if full else job.lora)
    with pytest.raises(TrainingError) as caught:
        finetune(job)
    said = str(caught.value)
    assert re.search(r"Step \d of 12: .* so the step was not taken", said)
    assert re.search(r"first in model\.embed_tokens \(sequence \d of 4\)", said)
    assert said.endswith("Examples there: row 7.")


def test_held_out_examples_that_are_not_finite_are_told(
    job: FinetuneJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(model: torch.nn.Module) -> Any:
        inner = loss_for(model)

        def loss(model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
            total, n_tokens = inner(model, batch)
            return (total if model.training else total * math.nan), n_tokens

        return loss

    monkeypatch.setattr("lora.fast.choose.loss_for", build)
    heard = Heard()
    done = finetune(job, heard)
    assert any("the validation loss is nan, not finite" in line for line in heard.said)
    rows = [row for row in read_rows(done.folder / "metrics.jsonl") if "eval_not_finite" in row]
    assert [row["step"] for row in rows] == [0, 10, 12]


def test_another_rank_data_or_rate_cannot_resume_a_run_and_more_steps_can(
    job: FinetuneJob,
) -> None:
    finetune(job)
    before = (job.run.out / "run" / "run.json").read_bytes()
    for change, seen in (
        ({"lora": LoRAConfig(rank=2)}, r"lora\.rank: 4 then, 2 now"),
        ({"data": make_orders("train", 25)}, r"data\.fingerprint"),
        ({"train": replace(job.train, learning_rate=1e-3)}, "learning_rate: 0.02 then, 0.001 now"),
    ):
        with pytest.raises(CheckpointError, match=seen):
            finetune(replace(job, resume=True, **change))
    assert (job.run.out / "run" / "run.json").read_bytes() == before
    more = replace(job.train, steps=15)
    assert finetune(replace(job, resume=True, train=more)).result.steps == 15


def test_a_resume_without_a_length_keeps_that_of_its_record(job: FinetuneJob) -> None:
    train = replace(job.train, steps=None, epochs=0.5)
    first = finetune(replace(job, train=train))
    n_sequences = read_json(first.folder / "run.json")["data"]["rows"]
    steps = -(-n_sequences // (2 * train.batch_size))  # half of the sequences
    recorded = read_json(first.folder / "run.json")["train"]
    assert (recorded["steps"], recorded["epochs"]) == (steps, None)
    assert first.result.steps == steps
    open_ended = replace(job, resume=True, train=replace(train, epochs=None))
    assert finetune(open_ended).result.steps == steps  # the default would be a hundred
    longer = replace(job, resume=True, train=replace(train, epochs=1.0))
    assert finetune(longer).result.steps == -(-n_sequences // train.batch_size)
    with pytest.raises(CheckpointError, match=r"train\.steps: .* then, 1 now: fewer"):
        finetune(replace(job, resume=True, train=replace(train, epochs=0.01)))


def test_a_deterministic_run_says_so_and_is_resumed_as_one(job: FinetuneJob) -> None:
    heard = Heard()
    done = finetune(replace(job, deterministic=True), heard)
    assert sum("deterministic algorithms" in line for line in heard.said) == 1
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(CheckpointError, match="deterministic: True then, not set now"):
        finetune(replace(job, resume=True))
    other = finetune(replace(job, run=replace(job.run, name="other")))
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):  # on a CPU all are
        assert (done.folder / name).read_bytes() == (other.folder / name).read_bytes()


def test_memory_that_runs_out_while_loading_names_the_plan(
    job: FinetuneJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("lora.finetune.model.load_language_model", refuse)
    with pytest.raises(TrainingError, match=r"while the weights were loaded\. planned memory:"):
        finetune(job)
    assert not (job.run.out / "run").exists()


def test_the_best_checkpoint_stays(job: FinetuneJob, tmp_path: Path) -> None:
    wild = replace(job.train, steps=20, learning_rate=0.3, schedule="constant")
    run = replace(job.run, eval_every_steps=2, save_every_steps=2, keep_checkpoints=1)
    done = finetune(replace(job, train=wild, run=run))
    losses = {
        row["step"]: row["eval_loss"]
        for row in read_rows(done.folder / "metrics.jsonl")
        if row["step"] and "eval_loss" in row
    }
    best = min(losses, key=lambda step: losses[step])
    kept = {path.name for path in list_checkpoints(done.folder / "checkpoints")}
    assert kept == {f"step-{best:06d}", "step-000020"}


@pytest.mark.slow
def test_memory_stays_flat_over_two_thousand_steps(job: FinetuneJob) -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    seen: dict[int, int] = {}

    class Watch(Heard):
        def step(self, step: int, loss: float, tokens_per_s: float, memory_bytes: int) -> None:
            if step in (200, 2000):
                seen[step] = resident_bytes()

    train = replace(job.train, steps=2000, batch_size=1, learning_rate=1e-4)
    finetune(
        replace(job, train=train, run=replace(job.run, save_every_steps=200, eval_every_steps=200)),
        Watch(),
    )
    assert seen[2000] - seen[200] < 16e6
