"""The training step and its loop: the right mean, nothing moved by a bad step, exact resume."""

from __future__ import annotations

import contextlib
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora.adapters.apply import lora_layers
from lora.config import RunConfig, TrainConfig
from lora.data.sequences.blocks import BlockStream, ordered_blocks
from lora.device import choose_device
from lora.errors import CheckpointError, Interrupted, TrainingError
from lora.runs.directory import create_run
from lora.runs.interrupts import SIGNALS
from lora.runs.progress import NoProgress, Progress
from lora.runs.read_record import read_metrics
from lora.training.checkpoint import list_checkpoints, save_checkpoint
from lora.training.job import TrainingJob, TrainResult
from lora.training.plain_step import PlainStepRunner, evaluate, train_step
from lora.training.step_runner import LossFn
from lora.training.trainer import train
from models.bigram_lm_v2 import BigramLanguageModel, bigram_loss
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA

CPU = torch.device("cpu")
Batch = tuple[Tensor, Tensor]


def squares(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """A loss whose number of targets differs from batch to batch."""
    inputs, targets = batch
    return ((model(inputs) - targets) ** 2).sum()[None], torch.tensor([len(inputs)])


def rows(count: int) -> Batch:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(count, 1, generator=generator, dtype=torch.float64)


def fresh() -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01])
@pytest.mark.parametrize("parts", [[12], [6, 6], [1, 4, 7]])
def test_the_step_is_the_same_however_its_rows_are_split(
    parts: list[int], max_grad_norm: float
) -> None:
    inputs, targets = rows(12)
    whole, optimizer = fresh()
    expected = train_step(
        whole, [(inputs, targets)], squares, optimizer, max_grad_norm=max_grad_norm
    )
    model, optimizer = fresh()
    split = list(zip(inputs.split(parts), targets.split(parts), strict=True))
    result = train_step(model, split, squares, optimizer, max_grad_norm=max_grad_norm)
    assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    assert result.gradient_norm.item() == pytest.approx(expected.gradient_norm.item(), rel=1e-12)
    assert int(result.n_tokens) == 12
    torch.testing.assert_close(model.weight, whole.weight, rtol=1e-12, atol=0)


def test_the_loss_is_the_mean_over_targets() -> None:
    model, optimizer = fresh()
    inputs, targets = rows(8)
    expected = ((model(inputs) - targets) ** 2).mean().item()
    assert train_step(model, [(inputs, targets)], squares, optimizer).loss.item() == pytest.approx(
        expected
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_moves_nothing(bad: float) -> None:
    model, _ = fresh()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    inputs, targets = rows(4)
    train_step(model, [(inputs, targets)], squares, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    moments = optimizer.state[model.weight]["exp_avg"].clone()
    targets[2] = bad
    with pytest.raises(TrainingError, match="not finite, so the step was not taken"):
        train_step(model, [(inputs, targets)], squares, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(moments, optimizer.state[model.weight]["exp_avg"])


def test_evaluation_is_the_mean_over_all_batches_with_dropout_off() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1).double())
    inputs, targets = rows(9)
    parts = list(zip(inputs.split([2, 7]), targets.split([2, 7]), strict=True))
    loss = evaluate(model, parts, squares)
    assert model.training
    assert loss == pytest.approx(((model[1](inputs) - targets) ** 2).mean().item())
    assert math.isnan(evaluate(model, [], squares))


def char_model(kind: str) -> BigramLanguageModel:
    torch.manual_seed(3)
    sizes = {"vocab_size": 20, "n_embd": 16, "n_head": 2, "n_layer": 1, "block_size": 8}
    base = BigramLanguageModel(**sizes, dropout=0.1)
    return base if kind == "full" else BigramLanguageModelLoRA.from_base(base, lora_rank=2, seed=1)


CHOICE = choose_device("cpu")


def plain_steps(
    model: nn.Module, config: TrainConfig, loss_fn: LossFn = bigram_loss
) -> PlainStepRunner:
    return PlainStepRunner(model, loss_fn, CHOICE, config)


class Stopped(Exception):
    """Stands for a kill between two steps."""


def run_job(
    folder: Path, kind: str, *, steps: int = 12, stop_at: int | None = None, resume: bool = False
) -> tuple[BigramLanguageModel, TrainResult | None, Path]:
    model = char_model(kind)
    torch.manual_seed(7)
    tokens = torch.randint(0, 20, (400,), generator=torch.Generator().manual_seed(0))
    config = TrainConfig(
        steps=steps, batch_size=4, gradient_accumulation=2, seed=1, learning_rate=1e-2
    )

    def stop(step: int) -> None:
        if step == stop_at:
            raise Stopped

    with create_run(folder, "run", resume=resume) as run:
        job = TrainingJob(
            model=model,
            steps=plain_steps(model, config),
            stream=BlockStream(tokens, 8, 2, seed=1, device=CPU),
            eval_batches=lambda: ordered_blocks(tokens[:100], 8, 4, 1000, CPU),
            train_config=config,
            run_config=RunConfig(eval_every_steps=3, save_every_steps=2),
            run=run,
            choice=CHOICE,
            on_eval=stop,
            resume=resume,
        )
        try:
            return model, train(job), run.folder
        except Stopped:
            return model, None, run.folder


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_ends_as_if_it_had_not_stopped(tmp_path: Path, kind: str) -> None:
    whole, result, folder = run_job(tmp_path / "whole", kind)
    assert result is not None
    _, stopped, _ = run_job(tmp_path / "parts", kind, stop_at=9)
    assert stopped is None
    model, resumed, parts = run_job(tmp_path / "parts", kind, resume=True)
    assert resumed is not None
    assert resumed.eval_loss == result.eval_loss
    for (name, a), b in zip(whole.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert (parts / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def train_with_losses(
    folder: Path,
    losses: dict[int, float],
    run_config: RunConfig,
    *,
    stop_at: int | None = None,
    progress: Progress | None = None,
    resume: bool = False,
) -> list[str]:
    """Train 100 steps whose evaluation after step n is losses[n]; return the checkpoints' names."""
    stream = BlockStream(torch.arange(20).repeat(9), 8, 2, seed=1, device=CPU)

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        if model.training:
            return bigram_loss(model, batch)
        return torch.tensor([losses.get(stream.state_dict()["row"] // 2, 9.0)]), torch.tensor([1])

    def stop(step: int) -> None:
        if step == stop_at:
            raise Stopped

    model = char_model("lora")
    config = TrainConfig(steps=100, batch_size=2, learning_rate=1e-3)
    with create_run(folder, "run", resume=resume) as run:
        job = TrainingJob(
            model=model,
            steps=plain_steps(model, config, loss_fn),
            stream=stream,
            eval_batches=lambda: ordered_blocks(torch.arange(20), 8, 2, 1, CPU),
            train_config=config,
            run_config=run_config,
            run=run,
            choice=CHOICE,
            progress=progress or NoProgress(),
            on_eval=stop,
            resume=resume,
        )
        with contextlib.suppress(Stopped, Interrupted):
            train(job)
    return [path.name for path in list_checkpoints(folder / "run" / "checkpoints")]


@pytest.mark.parametrize(
    ("save_every", "eval_every", "losses", "kept"),
    [
        (10, 30, {0: 5.0, 30: 1.0, 60: 2.0}, (30, 90, 100)),  # saved more often than evaluated
        (10, 30, {0: 5.0, 30: 2.0, 60: 1.0}, (60, 90, 100)),
        (50, 10, {0: 5.0, 20: 2.0, 30: 1.0}, (30, 50, 100)),  # less often
        (20, 30, {0: 5.0, 30: 1.0}, (30, 80, 100)),  # seldom on the same steps
        (20, 30, {0: 5.0, 30: 2.0, 90: 1.0}, (90, 100)),
        (10, 30, {0: 5.0, 100: 1.0}, (90, 100)),  # the last is the best
        (10, 30, {0: 1.0}, (30, 90, 100)),  # nothing is better than the start, which is not saved
        (10, 30, {0: 1.0, 60: 2.0}, (60, 90, 100)),  # but the best of what was trained is
        (10, 30, {0: 5.0, 30: 1.0, 60: math.nan}, (30, 90, 100)),
    ],
)
def test_the_best_checkpoint_is_the_one_that_was_evaluated(
    tmp_path: Path,
    save_every: int,
    eval_every: int,
    losses: dict[int, float],
    kept: tuple[int, ...],
) -> None:
    every = {"save_every_steps": save_every, "eval_every_steps": eval_every}
    run_config = RunConfig(**every, keep_checkpoints=2)
    names = train_with_losses(tmp_path, losses, run_config)
    assert names == [f"step-{step:06d}" for step in kept]


@pytest.mark.parametrize("stop_at", [30, 60, 90])
@pytest.mark.parametrize("save_every", [10, 20, 50])
def test_the_best_checkpoint_outlives_a_resume(
    tmp_path: Path, save_every: int, stop_at: int
) -> None:
    losses = {0: 5.0, 30: 1.0, 60: 2.0}
    run_config = RunConfig(save_every_steps=save_every, eval_every_steps=30, keep_checkpoints=2)
    whole = train_with_losses(tmp_path / "whole", losses, run_config)
    train_with_losses(tmp_path / "parts", losses, run_config, stop_at=stop_at)
    parts = train_with_losses(tmp_path / "parts", losses, run_config, resume=True)
    assert "step-000030" in parts
    assert parts == whole
    metrics = [(tmp_path / n / "run" / "metrics.jsonl").read_bytes() for n in ("whole", "parts")]
    assert metrics[0] == metrics[1]


def test_the_best_stays_on_the_disk_when_a_better_one_cannot_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path, step: int, *arguments: object, **options: object) -> Path:
        if step == 60:
            raise CheckpointError("No space left on device.")
        return save_checkpoint(folder, step, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("lora.training.job.save_checkpoint", refuse)
    run_config = RunConfig(save_every_steps=10, eval_every_steps=30, keep_checkpoints=2)
    names = train_with_losses(tmp_path, {0: 5.0, 30: 2.0, 60: 1.0}, run_config)
    assert names == ["step-000030", "step-000090", "step-000100"]


@pytest.mark.parametrize(
    ("losses", "refused", "kept"),
    [
        ({0: 5.0, 30: 1.0, 60: 2.0}, 30, (60, 90, 100)),  # else no best would be on the disk
        ({0: 5.0, 30: 3.0, 60: 1.0, 90: 2.0}, 60, (90, 100)),  # better than 30, which is kept
        ({0: 1.0, 30: 3.0}, 30, (60, 90, 100)),
    ],
)
def test_the_best_on_the_disk_follows_a_save_that_was_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    losses: dict[int, float],
    refused: int,
    kept: tuple[int, ...],
) -> None:
    def refuse(folder: Path, step: int, *arguments: object, **options: object) -> Path:
        if step == refused:
            raise CheckpointError("No space left on device.")
        return save_checkpoint(folder, step, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("lora.training.job.save_checkpoint", refuse)
    run_config = RunConfig(save_every_steps=10, eval_every_steps=30, keep_checkpoints=2)
    names = train_with_losses(tmp_path, losses, run_config)
    assert names == [f"step-{step:06d}" for step in kept]


class Signalling(NoProgress):
    """Sends a signal to this process at the first message or step that is asked for."""

    def __init__(self, at: object = None, number: signal.Signals = signal.SIGTERM) -> None:
        self.messages: list[str] = []
        self._at, self._number = at, number

    def message(self, message: str) -> None:
        self.messages.append(message)
        if isinstance(self._at, str) and message.startswith(self._at):
            self._at = None
            os.kill(os.getpid(), self._number)

    def step(self, step: int, loss: float, tokens_per_s: float, memory_bytes: int) -> None:
        if step == self._at:
            os.kill(os.getpid(), self._number)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("keep", [1, 2])
def test_a_signal_between_evaluations_keeps_the_best(
    tmp_path: Path, keep: int, number: signal.Signals
) -> None:
    losses, run_config = {0: 5.0, 10: 1.0, 20: 2.0}, RunConfig(keep_checkpoints=keep)
    whole = train_with_losses(tmp_path / "whole", losses, run_config)
    stopped = train_with_losses(tmp_path, losses, run_config, progress=Signalling(15, number))
    assert stopped == ["step-000010", "step-000015"]
    assert train_with_losses(tmp_path, losses, run_config, resume=True) == whole
    assert whole[0] == "step-000010"


def test_a_signal_in_the_first_evaluation_repeats_no_row(tmp_path: Path) -> None:
    run_config = RunConfig(patience=1, eval_every_steps=50)
    losses = {0: 5.0, 50: 4.0, 100: 3.0}
    progress = Signalling("step 0: validation loss")
    assert train_with_losses(tmp_path, losses, run_config, progress=progress) == []
    names = train_with_losses(tmp_path, losses, run_config, resume=True)
    assert names == ["step-000050", "step-000100"]
    metrics = read_metrics(tmp_path / "run")
    assert [row.step for row in metrics if row.eval_loss is not None] == [0, 50, 100]


def test_another_patience_goes_on_after_an_early_stop(tmp_path: Path) -> None:
    losses = {0: 5.0, 10: 1.0}
    train_with_losses(tmp_path, losses, RunConfig(patience=2))
    progress = Signalling()
    same = train_with_losses(
        tmp_path, losses, RunConfig(patience=2), resume=True, progress=progress
    )
    assert same[-1] == "step-000030"
    assert any("nothing to train" in m and "--patience 0" in m for m in progress.messages)
    names = train_with_losses(tmp_path, losses, RunConfig(patience=0), resume=True)
    assert names == ["step-000010", "step-000090", "step-000100"]


def test_the_best_that_a_damaged_checkpoint_had_pruned_names_nothing(tmp_path: Path) -> None:
    every = RunConfig(save_every_steps=10, eval_every_steps=10, keep_checkpoints=2)
    losses = {0: 5.0, 10: 3.0, 30: 1.0}
    train_with_losses(tmp_path, losses, every, stop_at=40)
    (tmp_path / "run" / "checkpoints" / "step-000030" / "tensors.safetensors").write_bytes(b"")
    names = train_with_losses(tmp_path, {30: 4.0}, every, resume=True)
    assert names == ["step-000030", "step-000090", "step-000100"]


def test_a_run_whose_steps_were_all_skipped_is_no_success(tmp_path: Path) -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        total, n_tokens = bigram_loss(model, batch)
        return (total * math.nan if model.training else total), n_tokens

    model, config = char_model("lora"), TrainConfig(steps=3, batch_size=2, learning_rate=1e-3)
    with create_run(tmp_path, "run") as run:
        job = TrainingJob(
            model=model,
            steps=plain_steps(model, config, loss_fn),
            stream=BlockStream(torch.arange(20).repeat(9), 8, 2, seed=1, device=CPU),
            eval_batches=list,
            train_config=config,
            run_config=RunConfig(skip_nonfinite=5),
            run=run,
            choice=CHOICE,
        )
        with pytest.raises(TrainingError, match="all 3 steps were not finite, so nothing"):
            train(job)


def test_lora_training_leaves_every_frozen_tensor_as_it_was(tmp_path: Path) -> None:
    before = {name: p.clone() for name, p in char_model("lora").named_parameters()}
    model, _, _ = run_job(tmp_path, "lora")
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved == trainable
    assert len(lora_layers(model)) == 7


def test_it_stops_early_when_the_loss_no_longer_falls(tmp_path: Path) -> None:
    said: list[str] = []
    model = char_model("full")
    losses = iter([3.0, 2.0, 2.5, 2.5, 2.5, 2.5])

    def eval_batches() -> list[Batch]:
        return [(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64))]

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        if model.training:
            return bigram_loss(model, batch)
        return torch.tensor([next(losses)]), torch.tensor([1])

    config = TrainConfig(steps=50, batch_size=4, learning_rate=1e-2)
    with create_run(tmp_path, "run") as run:
        job = TrainingJob(
            model=model,
            steps=plain_steps(model, config, loss_fn),
            stream=BlockStream(torch.arange(20).repeat(9), 8, 4, seed=1, device=CPU),
            eval_batches=eval_batches,
            train_config=config,
            run_config=RunConfig(eval_every_steps=2, patience=2),
            run=run,
            choice=CHOICE,
        )
        result = train(replace(job, on_eval=lambda step: said.append(str(step))))
    assert result.stopped_early
    assert result.steps == 6
    assert result.best_eval_loss == 2.0
    assert said == ["0", "2", "4", "6"]


@pytest.mark.parametrize(
    ("steps", "asked", "expected"),
    [
        (1, 0, [0, 1]),
        (9, 0, [0, 9]),
        (10, 0, [0, 10]),
        (25, 0, [0, 10, 20, 25]),
        (100, 0, [0, *range(10, 101, 10)]),
        (101, 0, [0, *range(11, 100, 11), 101]),
        (9, 4, [0, 4, 8, 9]),
    ],
)
def test_evaluations_are_few_and_always_at_both_ends(
    tmp_path: Path, steps: int, asked: int, expected: list[int]
) -> None:
    seen: list[int] = []
    tokens = torch.arange(20).repeat(9)
    model = char_model("lora")
    config = TrainConfig(steps=steps, batch_size=2, learning_rate=1e-3)
    with create_run(tmp_path, "run") as run:
        train(
            TrainingJob(
                model=model,
                steps=plain_steps(model, config),
                stream=BlockStream(tokens, 8, 2, seed=1, device=CPU),
                eval_batches=lambda: ordered_blocks(tokens[:20], 8, 2, 1, CPU),
                train_config=config,
                run_config=RunConfig(eval_every_steps=asked),
                run=run,
                choice=CHOICE,
                on_eval=seen.append,
            )
        )
    assert seen == expected


def test_a_run_names_the_step_that_was_not_finite(tmp_path: Path) -> None:
    calls: list[int] = []

    def sometimes_nan(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, count = bigram_loss(model, batch)
        calls.append(1)
        return (loss * math.nan if len(calls) == 3 else loss), count

    model = char_model("full")
    config = TrainConfig(steps=5, batch_size=4, learning_rate=1e-2)
    with create_run(tmp_path, "run") as run:
        job = TrainingJob(
            model=model,
            steps=plain_steps(model, config, sometimes_nan),
            stream=BlockStream(torch.arange(20).repeat(9), 8, 4, seed=1, device=CPU),
            eval_batches=list,
            train_config=config,
            run_config=RunConfig(),
            run=run,
            choice=CHOICE,
        )
        with pytest.raises(TrainingError, match="Step 3 of 5"):
            train(job)
        assert [row.step for row in run.read_metrics()] == [1, 2]
