"""Callbacks: what they are given, how they stop a run, and that what they raise costs no step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora
from lora.config import RunConfig, TrainConfig
from lora.data.sequences.blocks import BlockStream, ordered_blocks
from lora.device import choose_device
from lora.errors import ConfigError
from lora.runs.directory import create_run
from lora.runs.progress import NoProgress
from lora.training.callbacks import (
    Callback,
    EvalEvent,
    SaveEvent,
    StepEvent,
    StopTraining,
    TrainingEvent,
    as_callbacks,
)
from lora.training.checkpoint import list_checkpoints
from lora.training.job import TrainingJob, TrainResult
from lora.training.plain_step import PlainStepRunner
from lora.training.step_runner import StepOutcome
from lora.training.trainer import train
from models.bigram_lm_v2 import BigramLanguageModel, bigram_loss
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA

CPU, CHOICE = torch.device("cpu"), choose_device("cpu")


class LateRunner(PlainStepRunner):
    """Returns each outcome one step late, as runners on a GPU do."""

    def finished(self, *, wait: bool) -> list[StepOutcome]:
        if wait:
            return super().finished(wait=True)
        late, self._outcomes = self._outcomes[:-1], self._outcomes[-1:]
        return late


class Recorder(Callback):
    """Keeps all events; `act` may raise."""

    def __init__(self, act: Callable[[TrainingEvent], None] = lambda event: None) -> None:
        self.events: list[TrainingEvent] = []
        self.act = act

    def on_step(self, event: StepEvent) -> None:
        self._keep(event)

    def on_eval(self, event: EvalEvent) -> None:
        self._keep(event)

    def on_save(self, event: SaveEvent) -> None:
        self._keep(event)

    def _keep(self, event: TrainingEvent) -> None:
        self.events.append(event)
        self.act(event)

    def steps_of(self, kind: type[TrainingEvent]) -> list[int]:
        return [event.step for event in self.events if type(event) is kind]


class Messages(NoProgress):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def message(self, message: str) -> None:
        self.heard.append(message)


def run(
    folder: Path,
    callbacks: Sequence[Callback] = (),
    *,
    resume: bool = False,
    runner: type[PlainStepRunner] = PlainStepRunner,
    progress: NoProgress | None = None,
) -> tuple[nn.Module, TrainResult]:
    """Train 12 steps, evaluated at every third and saved at every fifth."""
    torch.manual_seed(3)
    sizes = {"vocab_size": 20, "n_embd": 16, "n_head": 2, "n_layer": 1, "block_size": 8}
    base = BigramLanguageModel(**sizes, dropout=0.1)
    model = BigramLanguageModelLoRA.from_base(base, lora_rank=2, seed=1)
    torch.manual_seed(7)
    tokens = torch.randint(0, 20, (400,), generator=torch.Generator().manual_seed(0))
    config = TrainConfig(steps=12, batch_size=4, seed=1, learning_rate=1e-2)
    with create_run(folder, "run", resume=resume) as opened:
        job = TrainingJob(
            model=model,
            steps=runner(model, bigram_loss, CHOICE, config),
            stream=BlockStream(tokens, 8, 4, seed=1, device=CPU),
            eval_batches=lambda: ordered_blocks(tokens[:100], 8, 4, 1000, CPU),
            train_config=config,
            run_config=RunConfig(eval_every_steps=3, save_every_steps=5),
            run=opened,
            choice=CHOICE,
            progress=progress or NoProgress(),
            resume=resume,
            callbacks=callbacks,
        )
        return model, train(job)


def raising(kind: type[TrainingEvent], step: int, error: Exception) -> Recorder:
    def act(event: TrainingEvent) -> None:
        if type(event) is kind and event.step == step:
            raise error

    return Recorder(act)


@pytest.mark.parametrize("runner", [PlainStepRunner, LateRunner])
def test_every_event_comes_once_in_order_with_the_runs_figures(
    tmp_path: Path, runner: type[PlainStepRunner]
) -> None:
    recorder = Recorder()
    model, result = run(tmp_path, [recorder], runner=runner)
    assert recorder.steps_of(StepEvent) == list(range(1, 13))
    assert recorder.steps_of(EvalEvent) == [0, 3, 6, 9, 12]
    saves = [event for event in recorder.events if isinstance(event, SaveEvent)]
    assert {5, 10, 12} <= {event.step for event in saves}
    assert all(event.checkpoint.name.endswith(f"{event.step}") for event in saves)
    rows = [row for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if row]
    assert len(rows) == 12 + 5
    steps = [event for event in recorder.events if isinstance(event, StepEvent)]
    assert steps[-1].n_tokens == result.n_tokens
    evals = [event for event in recorder.events if isinstance(event, EvalEvent)]
    assert evals[-1].eval_loss == result.eval_loss
    assert evals[-1].best_eval_loss == result.best_eval_loss
    assert all(event.model is model for event in recorder.events)
    assert {(event.total_steps, event.folder) for event in recorder.events} == {
        (12, tmp_path / "run")
    }


def test_callbacks_change_no_byte(tmp_path: Path) -> None:
    plain, _ = run(tmp_path / "plain")
    called, _ = run(tmp_path / "called", [Recorder(), Callback()])
    for a, b in zip(plain.parameters(), called.parameters(), strict=True):
        assert torch.equal(a, b)
    files = [tmp_path / name / "run" / "metrics.jsonl" for name in ("plain", "called")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("runner", [PlainStepRunner, LateRunner])
@pytest.mark.parametrize(
    ("kind", "step", "ends"), [(StepEvent, 4, 4), (EvalEvent, 6, 6), (SaveEvent, 5, 6)]
)
def test_a_stop_ends_the_run_evaluated_and_saved(
    tmp_path: Path,
    kind: type[TrainingEvent],
    step: int,
    ends: int,
    runner: type[PlainStepRunner],
) -> None:
    said, other = Messages(), Recorder()
    stopping = raising(kind, step, StopTraining("good enough"))
    _, result = run(tmp_path, [stopping, other], runner=runner, progress=said)
    is_late = runner is LateRunner and kind is StepEvent  # heard when the next one is taken
    assert result.steps == ends + is_late
    assert result.stopped_early
    assert other.steps_of(StepEvent) == list(range(1, result.steps + 1))
    assert other.steps_of(EvalEvent)[-1] == result.steps
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name.endswith(str(result.steps))
    assert any("Recorder stops the run: good enough" in message for message in said.heard)
    _, resumed = run(tmp_path, resume=True)  # without the callback it goes on
    assert (resumed.steps, resumed.stopped_early) == (12, False)


def test_a_stop_at_the_start_trains_nothing(tmp_path: Path) -> None:
    _, result = run(tmp_path, [raising(EvalEvent, 0, StopTraining())])
    assert (result.steps, result.stopped_early) == (0, True)


@pytest.mark.parametrize("runner", [PlainStepRunner, LateRunner])
@pytest.mark.parametrize(
    ("kind", "step"),
    [(StepEvent, 1), (StepEvent, 4), (StepEvent, 6), (EvalEvent, 9), (SaveEvent, 5)],
)
def test_what_a_callback_raises_comes_out_and_the_resumed_run_loses_nothing(
    tmp_path: Path, kind: type[TrainingEvent], step: int, runner: type[PlainStepRunner]
) -> None:
    whole, _ = run(tmp_path / "whole", runner=runner)
    failing = raising(kind, step, ZeroDivisionError("a bug of the user"))
    with pytest.raises(ZeroDivisionError, match="a bug of the user"):
        run(tmp_path / "parts", [failing], runner=runner)
    saved = list_checkpoints(tmp_path / "parts" / "run" / "checkpoints")[-1]
    assert int(saved.name.rpartition("-")[2]) in (step, step + 1)
    resumed, result = run(tmp_path / "parts", resume=True, runner=runner)
    assert result.steps == 12
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    files = [tmp_path / name / "run" / "metrics.jsonl" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_one_or_several_are_taken_and_anything_else_is_refused() -> None:
    one = Callback()
    assert as_callbacks(one) == as_callbacks([one]) == (one,)
    assert as_callbacks(()) == ()
    wrong: list[Any] = [print, [one, 3], Callback, [Callback], None, "on_step"]
    for given in wrong:
        with pytest.raises(ConfigError, match=r"as a callback\. Allowed: objects of a subclass"):
            as_callbacks(given)
    with pytest.raises(ConfigError, match="as a callback"):
        lora.finetune("missing.jsonl", callbacks=print)  # type: ignore[arg-type]
