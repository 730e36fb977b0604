"""Whole runs of two processes: what they write, how they stop and resume, what they refuse."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

import lora
from lora.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.distributed.world import World
from lora.errors import ConfigError, Interrupted, LostProcessError
from lora.finetune import FinetuneJob, finetune
from lora.runs.progress import Progress
from lora.runs.read_record import read_metrics, read_run_record
from lora.training.callbacks import Callback, StepEvent, StopTraining
from tests.distributed.processes import run_processes
from tests.heard import Heard

# Its processes are started once, in one of the workers that share the tests.
pytestmark = pytest.mark.xdist_group("runs_of_several")

KILLED_STEP = 3


class Kill(Callback):
    """Sends this process a SIGTERM after a step: rank 0 alone, which has the callbacks."""

    def on_step(self, event: StepEvent) -> None:
        if event.step == KILLED_STEP:
            os.kill(os.getpid(), signal.SIGTERM)


class Enough(Callback):
    """Ends the run after a step."""

    def on_step(self, event: StepEvent) -> None:
        if event.step == KILLED_STEP:
            raise StopTraining("enough")


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended in one process."""

    folder: Path
    saved: Path
    steps: int
    eval_loss: float


def make_job(folder: Path, out: Path, name: str, **changes: Any) -> FinetuneJob:
    """Return a job of eight steps with dropout off."""
    return FinetuneJob(
        data=make_orders("train", 24),
        model=str(folder),
        lora=LoRAConfig(rank=4),
        train=TrainConfig(steps=8, batch_size=6, gradient_accumulation=2, learning_rate=1e-3),
        data_config=DataConfig(max_length=128),
        run=RunConfig(out=out, name=name, eval_every_steps=4, save_every_steps=3, samples=1),
        **changes,
    )


def run_job(job: FinetuneJob, *callbacks: Callback, progress: Progress | None = None) -> RunOutcome:
    """Return how `job` ended."""
    done = finetune(job, progress, callbacks=callbacks)
    return RunOutcome(done.folder, done.saved, done.result.steps, done.result.eval_loss)


def interrupt(job: FinetuneJob) -> str:
    """Return what a run says that a signal stopped."""
    with pytest.raises(Interrupted) as raised:
        finetune(job, callbacks=Kill())
    assert raised.value.exit_code == 128 + signal.SIGTERM
    return str(raised.value)


def train_own(folder: Path, out: Path) -> tuple[RunOutcome, list[float]]:
    """Train a model in memory whose A every process drew with another seed."""
    model, tokenizer = lora.load_model(folder)
    torch.manual_seed(int(os.environ["RANK"]))
    lora.apply_lora(model, LoRAConfig(rank=4))
    done = lora.train(model, tokenizer, make_orders("train", 24), steps=2, out=out, name="own")
    outcome = RunOutcome(done.folder, done.saved, done.result.steps, done.result.eval_loss)
    return outcome, [
        p.detach().double().sum().item() for p in model.parameters() if p.requires_grad
    ]


def refuse_own(world: World, folder: Path, out: Path) -> str:
    """Return why models in memory are refused whose A and B have another size in each process."""
    model, tokenizer = lora.load_model(folder)
    lora.apply_lora(model, LoRAConfig(rank=5 - world.rank))
    with pytest.raises(ConfigError) as raised:
        lora.train(model, tokenizer, make_orders("train", 24), steps=2, out=out, name="unlike")
    return str(raised.value)


class Fail(Callback):
    """Raises after a step."""

    def on_step(self, event: StepEvent) -> None:
        if event.step == KILLED_STEP:
            raise ValueError("a fault of the user's")


def fail(world: World, folder: Path, out: Path) -> str:
    """Return what ends this process's part of a run whose callback raises on rank 0."""
    with pytest.raises((ValueError, LostProcessError)) as raised:
        finetune(make_job(folder, out, "failed"), callbacks=Fail())
    return type(raised.value).__name__


def train_damaged(world: World, job: FinetuneJob) -> str:
    """Return what a run says in which the last rank's updates are not those of the others."""
    update = torch.optim.AdamW.step

    def damaged(optimizer: torch.optim.AdamW) -> None:
        update(optimizer)
        if world.rank == world.size - 1:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0][0, 0] += 1e-4

    heard = Heard()
    with patch.object(torch.optim.AdamW, "step", damaged):
        run_job(job, progress=heard)
    return "\n".join(heard.said)


def refuse(job: FinetuneJob) -> str:
    """Return why `job` is refused."""
    with pytest.raises(ConfigError) as raised:
        finetune(job)
    return str(raised.value)


def train_together(world: World, folder: Path, out: Path) -> dict[str, Any]:
    """Run all jobs of these tests in one of several processes."""
    heard = Heard()
    done: dict[str, Any] = {"whole": run_job(make_job(folder, out, "whole"), progress=heard)}
    done["said"] = "\n".join(heard.said)
    done["message"] = interrupt(make_job(folder, out, "cut"))
    interrupt(make_job(folder, out, "again"))
    done["again"] = run_job(make_job(folder, out, "again", resume=True))
    done["alone"] = run_job(make_job(folder, out, "alone", resume=True))
    done["enough"] = run_job(make_job(folder, out, "enough"), Enough())
    done["unnamed"] = run_job(replace(make_job(folder, out, "x"), run=RunConfig(out=out)))
    done["damaged"] = train_damaged(world, make_job(folder, out, "damaged"))
    done["own"], done["sums"] = train_own(folder, out)
    done["unlike"] = refuse_own(world, folder, out)
    small = TrainConfig(steps=2, batch_size=2, gradient_accumulation=2)
    done["small"] = refuse(replace(make_job(folder, out, "small"), train=small))
    other = make_orders("train", 24, seed=world.rank)
    done["other"] = refuse(replace(make_job(folder, out, "other"), data=other))
    return done


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def together(tiny_folder: Path, out: Path) -> list[dict[str, Any]]:
    interrupt(make_job(tiny_folder, out, "alone"))
    return run_processes(2, train_together, tiny_folder, out)


@pytest.fixture(scope="module")
def one(tiny_folder: Path, out: Path, together: object) -> RunOutcome:
    return run_job(make_job(tiny_folder, out, "one"))


def assert_same_run(found: Path, expected: Path) -> None:
    """Compare metrics and adapters up to rounding."""
    ours, theirs = read_metrics(found), read_metrics(expected)
    assert [row.step for row in ours] == [row.step for row in theirs]
    assert [row.tokens for row in ours] == [row.tokens for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("loss", "learning_rate", "gradient_norm", "eval_loss"):
            expected_value = getattr(other, name)
            if expected_value is not None:
                expected_value = pytest.approx(expected_value, rel=1e-5)
            assert getattr(mine, name) == expected_value, name
    tensors = load_file(expected / "adapter" / "adapter_model.safetensors")
    for name, tensor in load_file(found / "adapter" / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, tensors[name], rtol=1e-4, atol=1e-6)


def assert_same_bytes(found: Path, expected: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl", "adapter/adapter_model.safetensors"):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def test_two_processes_make_the_run_of_one(together: list[dict[str, Any]], one: RunOutcome) -> None:
    for done in together:
        assert done["whole"].folder.name == "whole"
        assert_same_run(done["whole"].folder, one.folder)
        assert (done["whole"].folder / "samples.jsonl").is_file()
    record = read_run_record(together[0]["whole"].folder)
    assert (record.world_size, record.parallel) == (2, "ddp")
    values = json.loads((one.folder / "run.json").read_text())
    assert not {"world_size", "parallel"} & values.keys()


def test_rank_0_alone_tells_what_the_run_does(together: list[dict[str, Any]]) -> None:
    said = [done["said"] for done in together]
    assert "processes: 2, each with 2 of the 3 sequences of a micro-batch or fewer" in said[0]
    assert "--batch-size 8 takes no longer" in said[0]
    assert said[1] == ""


def test_weights_that_are_not_those_of_rank_0_are_told(together: list[dict[str, Any]]) -> None:
    assert (
        "after step 3 the weights that train differ from rank 0's on rank 1"
        in (together[0]["damaged"])
    )
    assert "differ from rank 0's" not in together[0]["said"]


def test_a_signal_to_one_rank_stops_all_after_one_step(together: list[dict[str, Any]]) -> None:
    for done in together:
        assert (
            f"after step {KILLED_STEP + 1} of 8; step {KILLED_STEP + 1} is saved"
            in (done["message"])
        )


def test_resumed_by_as_many_processes_it_ends_with_the_same_bytes(
    together: list[dict[str, Any]],
) -> None:
    assert_same_bytes(together[0]["again"].folder, together[0]["whole"].folder)


def test_resumed_by_another_number_of_processes_it_is_the_same_run(
    tiny_folder: Path, out: Path, together: list[dict[str, Any]], one: RunOutcome
) -> None:
    assert_same_run(together[0]["alone"].folder, one.folder)
    cut = run_job(make_job(tiny_folder, out, "cut", resume=True))
    assert_same_run(cut.folder, one.folder)


def test_a_callback_of_rank_0_ends_the_run_of_all(together: list[dict[str, Any]]) -> None:
    assert [done["enough"].steps for done in together] == [KILLED_STEP + 1] * 2


def test_a_callback_that_raises_on_rank_0_loses_nothing(
    tiny_folder: Path, out: Path, one: RunOutcome
) -> None:
    assert run_processes(2, fail, tiny_folder, out) == ["ValueError", "LostProcessError"]
    resumed = run_job(make_job(tiny_folder, out, "failed", resume=True))
    assert_same_run(resumed.folder, one.folder)


def test_a_run_without_a_name_has_one(together: list[dict[str, Any]], out: Path) -> None:
    first, second = (done["unnamed"].folder for done in together)
    assert first == second
    assert (first / "result.json").is_file()


def test_a_model_in_memory_starts_and_ends_alike(together: list[dict[str, Any]]) -> None:
    assert together[0]["sums"] == together[1]["sums"]
    assert read_run_record(together[0]["own"].folder).world_size == 2


def test_what_cannot_be_shared_is_refused_on_every_rank(
    together: list[dict[str, Any]], out: Path
) -> None:
    for done in together:
        assert "2 processes: a micro-batch has 1 sequence (batch_size=2" in done["small"]
        assert "Use gradient_accumulation=1" in done["small"]
        assert "data: " in done["other"]
        assert "on rank 1" in done["other"]
        assert "lora: {'rank': 5" in done["unlike"]
    assert not (out / "unlike").exists()
    assert not (out / "small").exists()
    assert not (out / "other").exists()
