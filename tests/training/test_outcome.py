"""What a run leaves: the best weights or the last, also after a resume, and plain words on them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora.config import RunConfig, TrainConfig
from lora.data.sequences.blocks import BlockStream, ordered_blocks
from lora.device import choose_device
from lora.runs.directory import create_run
from lora.runs.progress import NoProgress
from lora.training.checkpoint import checkpoint_path, read_trained_tensors
from lora.training.job import TrainingJob, TrainResult
from lora.training.outcome import describe_result, describe_saved
from lora.training.plain_step import PlainStepRunner
from lora.training.trainer import train
from models.bigram_lm_v2 import BigramLanguageModel, bigram_loss
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA

CHOICE = choose_device("cpu")
Batch = tuple[Tensor, Tensor]
EVERY_TEN = RunConfig(eval_every_steps=10, keep_checkpoints=1)


class Killed(Exception):
    """Stands for a kill between two steps."""


class Run(NoProgress):
    """A run of 50 steps whose validation loss after step n is given."""

    def __init__(self, folder: Path, losses: dict[int, float], config: RunConfig = EVERY_TEN):
        self.folder, self.losses, self.config = folder, losses, config
        self.messages: list[str] = []
        torch.manual_seed(3)
        base = BigramLanguageModel(vocab_size=20, n_embd=16, n_head=2, n_layer=1, block_size=8)
        self.model = BigramLanguageModelLoRA.from_base(base, lora_rank=2, seed=1)
        self.rate = 1e-2

    def message(self, message: str) -> None:
        self.messages.append(message)

    def train(self, *, kill_at: int | None = None, resume: bool = False) -> TrainResult | None:
        stream = BlockStream(torch.arange(20).repeat(9), 8, 2, seed=1, device=CHOICE.device)

        def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            if model.training:
                return bigram_loss(model, batch)
            step = stream.state_dict()["row"] // 2
            return torch.tensor([self.losses.get(step, 9.0)]), torch.tensor([1])

        def kill(step: int) -> None:
            if step == kill_at:
                raise Killed

        train_config = TrainConfig(steps=50, batch_size=2, learning_rate=self.rate)
        with create_run(self.folder, "run", resume=resume) as run:
            job = TrainingJob(
                model=self.model,
                steps=PlainStepRunner(self.model, loss_fn, CHOICE, train_config),
                stream=stream,
                eval_batches=lambda: (
                    ordered_blocks(torch.arange(20), 8, 2, 1, CHOICE.device) if self.losses else []
                ),
                train_config=train_config,
                run_config=self.config,
                run=run,
                choice=CHOICE,
                progress=self,
                on_eval=kill,
                resume=resume,
                start_name="the model without an adapter",
            )
            with contextlib.suppress(Killed):
                return train(job)
        return None

    def trained(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}

    def holds(self, step: int) -> bool:
        saved = read_trained_tensors(checkpoint_path(self.folder / "run" / "checkpoints", step))
        own = self.trained()
        return saved.keys() == own.keys() and all(torch.equal(saved[n], own[n]) for n in own)


LOSSES = {0: 5.3, 10: 5.0, 20: 4.3, 30: 5.0, 40: 5.5, 50: 5.6}


def test_the_model_ends_with_the_best_weights(tmp_path: Path) -> None:
    run = Run(tmp_path, LOSSES)
    result = run.train()
    assert result is not None
    assert run.holds(20)
    assert not run.holds(50)
    assert (result.saved_step, result.best_step) == (20, 20)
    assert result.saved_eval_loss == result.best_eval_loss == pytest.approx(4.3)
    assert (result.start_eval_loss, result.eval_loss) == (pytest.approx(5.3), pytest.approx(5.6))
    first = describe_result(result)[0]
    assert first == (
        "validation loss: 5.3000 at the start, best 4.3000 at step 20, 5.6000 at the end (step 50)"
    )
    assert describe_saved(result) == "step 20, the best"
    (warning,) = result.warnings
    assert "the end of the run is worse than the model without an adapter" in warning
    assert "5.6000 after step 50, and 5.3000 before training. Saved is step 20" in warning
    assert f"warning: {warning}" in run.messages
    assert not result.diverged


def test_the_last_weights_are_saved_on_request(tmp_path: Path) -> None:
    run = Run(tmp_path, LOSSES, replace(EVERY_TEN, save="last"))
    result = run.train()
    assert result is not None
    assert run.holds(50)
    assert (result.saved_step, result.best_step) == (50, 20)
    assert "what was saved is worse than the model without an adapter" in result.warnings[0]
    assert describe_saved(result) == "step 50, the last"


def test_patience_saves_the_best_and_says_that_it_stopped(tmp_path: Path) -> None:
    run = Run(tmp_path, LOSSES, replace(EVERY_TEN, patience=2))
    result = run.train()
    assert result is not None
    assert (result.steps, result.saved_step, result.stopped_early) == (40, 20, True)
    assert run.holds(20)
    assert "at the end (step 40, stopped early)" in describe_result(result)[0]


@pytest.mark.parametrize("kill_at", [20, 30, 50])
@pytest.mark.parametrize("save_every", [0, 25])
def test_after_a_kill_the_best_is_that_of_the_whole_run(
    tmp_path: Path, kill_at: int, save_every: int
) -> None:
    config = replace(EVERY_TEN, save_every_steps=save_every)
    whole = Run(tmp_path / "whole", LOSSES, config)
    result = whole.train()
    assert Run(tmp_path / "parts", LOSSES, config).train(kill_at=kill_at) is None
    parts = Run(tmp_path / "parts", LOSSES, config)
    resumed = parts.train(resume=True)
    assert result is not None
    assert resumed is not None
    assert {**vars(resumed), "train_s": 0, "peak_memory_bytes": 0} == {
        **vars(result), "train_s": 0, "peak_memory_bytes": 0,
    }  # fmt: skip
    assert all(torch.equal(t, whole.trained()[n]) for n, t in parts.trained().items())


def test_a_start_that_is_never_reached_is_told_and_the_best_trained_saved(tmp_path: Path) -> None:
    run = Run(tmp_path, {**LOSSES, 0: 4.0})
    result = run.train()
    assert result is not None
    assert run.holds(20)
    assert (result.best_step, result.saved_step) == (0, 20)
    assert "best is the start" in describe_result(result)[0]
    assert describe_saved(result) == "step 20, the best after the start"
    assert "4.3000 after step 20, and 4.0000 before training" in result.warnings[0]


def test_a_last_evaluation_that_is_not_finite_saves_the_best(tmp_path: Path) -> None:
    run = Run(tmp_path, {**LOSSES, 50: math.nan})
    result = run.train()
    assert result is not None
    assert result.saved_step == 20
    assert run.holds(20)


def test_a_damaged_best_leaves_the_last_and_says_so(tmp_path: Path) -> None:
    run = Run(tmp_path, LOSSES)
    run.train()
    damaged = tmp_path / "run" / "checkpoints" / "step-000020" / "tensors.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = Run(tmp_path, LOSSES)
    result = again.train(resume=True)
    assert result is not None
    assert result.saved_step == 50
    assert again.holds(50)
    assert any("damaged" in m and "the end of the run, step 50" in m for m in again.messages)


def test_a_learning_rate_of_ten_is_told_with_and_without_validation(tmp_path: Path) -> None:
    blind = Run(tmp_path / "blind", {})
    blind.rate = 10.0
    result = blind.train()
    assert result is not None
    assert result.diverged
    assert "the training loss diverged" in result.warnings[0]
    assert "Lower the learning rate (it was 10)" in result.warnings[0]
    seeing = Run(tmp_path / "seeing", {0: 3.0, **dict.fromkeys((10, 20, 30, 40, 50), 40.0)})
    result = seeing.train()
    assert result is not None
    assert result.diverged
    assert "what was saved is worse" in result.warnings[0]


def test_a_checkpoint_of_an_older_version_gets_its_start_from_the_metrics(tmp_path: Path) -> None:
    Run(tmp_path, LOSSES).train(kill_at=40)
    folder = tmp_path / "run" / "checkpoints"
    newest = max(folder.iterdir())
    state = json.loads((newest / "state.json").read_text())
    for name in ("start_eval_loss", "best_eval_step", "first_loss"):
        del state["position"][name]
    (newest / "state.json").write_text(json.dumps(state))
    manifest = json.loads((newest / "manifest.json").read_text())
    content = (newest / "state.json").read_bytes()
    manifest["state.json"] = {
        "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()
    }  # fmt: skip
    (newest / "manifest.json").write_text(json.dumps(manifest))
    run = Run(tmp_path, LOSSES)
    result = run.train(resume=True)
    assert result is not None
    assert (result.start_eval_loss, result.best_step) == (pytest.approx(5.3), 20)
    assert run.holds(20)
