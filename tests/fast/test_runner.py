"""The loop with the fast step: the plain step's figures, exact resume, and what is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora.adapters.apply import apply_lora
from lora.config import LoRAConfig, RunConfig, TrainConfig
from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder
from lora.device import choose_device
from lora.errors import TrainingError
from lora.fast.runner import FastStepRunner
from lora.runs.directory import create_run
from lora.runs.disk import read_rows
from lora.runs.record import RunRecord
from lora.training.checkpoint import list_checkpoints
from lora.training.job import TrainingJob, TrainResult
from lora.training.losses import loss_for
from lora.training.plain_step import PlainStepRunner
from lora.training.step_runner import StepRunner
from lora.training.trainer import train

STEPS = 12


class Stream:
    """Packed batches by number."""

    def __init__(self, make: Callable[..., Batch]) -> None:
        self.make, self.number = make, 0

    def __next__(self) -> Batch:
        self.number += 1
        return self.make(self.number, packed=self.number % 3 > 0)

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


@pytest.fixture
def run_job(
    tiny_decoder: Callable[..., Decoder], make_batch: Callable[..., Batch], tmp_path: Path
) -> Callable[..., tuple[TrainResult, Path, Decoder]]:
    choice = choose_device("cpu")

    def run(
        name: str,
        *,
        fast: bool,
        lora: LoRAConfig | None,
        resume: bool = False,
        damage: Callable[[Decoder], None] = lambda model: None,
    ) -> tuple[TrainResult, Path, Decoder]:
        model = tiny_decoder(dtype=torch.float32)
        apply_lora(model, lora) if lora is not None else model.requires_grad_(True)
        config = TrainConfig(
            steps=STEPS,
            batch_size=4,
            gradient_accumulation=2,
            weight_decay=0.01,
            learning_rate=5e-3,
        )
        damage(model)
        steps: StepRunner = PlainStepRunner(model, loss_for(model), choice, config)
        if fast:
            steps = own = FastStepRunner(model, choice, config)
            assert "fast step: no graph, plain torch kernels" in own.describe()
        with create_run(tmp_path, name, resume=resume, record=RunRecord()) as folder:
            job = TrainingJob(
                model=model,
                steps=steps,
                stream=Stream(make_batch),
                eval_batches=lambda: [make_batch(1000, packed=True)],
                train_config=config,
                run_config=RunConfig(eval_every_steps=4, save_every_steps=4, keep_checkpoints=9),
                run=folder,
                choice=choice,
                resume=resume,
            )
            return train(job), folder.folder, model

    return run


@pytest.mark.parametrize("lora", [LoRAConfig(rank=4, init_seed=0), None], ids=["lora", "full"])
def test_the_loop_gets_the_plain_steps_figures(
    run_job: Callable[..., tuple[TrainResult, Path, Decoder]], lora: LoRAConfig | None
) -> None:
    plain, plain_folder, _ = run_job("plain", fast=False, lora=lora)
    fast, fast_folder, _ = run_job("fast", fast=True, lora=lora)
    rows = [read_rows(f / "metrics.jsonl") for f in (plain_folder, fast_folder)]
    assert len(rows[0]) == len(rows[1]) == STEPS + 1 + STEPS // 4
    for expected, row in zip(*rows, strict=True):
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=2e-4), key
    assert (fast.steps, fast.n_tokens) == (plain.steps, plain.n_tokens)
    assert len(read_rows(fast_folder / "timings.jsonl")) == STEPS


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_is_the_uninterrupted_one(
    run_job: Callable[..., tuple[TrainResult, Path, Decoder]], tmp_path: Path, dropout: float
) -> None:
    lora = LoRAConfig(rank=4, init_seed=0, dropout=dropout)
    _, folder, whole = run_job("run", fast=True, lora=lora)
    written = (folder / "metrics.jsonl").read_bytes()
    for path in list_checkpoints(folder / "checkpoints")[-1:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    _, _, resumed = run_job("run", fast=True, lora=lora, resume=True)
    assert (folder / "metrics.jsonl").read_bytes() == written
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_is_not_finite_names_step_layer_and_row(
    run_job: Callable[..., tuple[TrainResult, Path, Decoder]],
) -> None:
    def damage(model: Decoder) -> None:
        with torch.no_grad():  # finite itself, infinite in the product
            model.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(1e38)

    with pytest.raises(TrainingError) as caught:
        run_job("run", fast=True, lora=LoRAConfig(rank=4, init_seed=0), damage=damage)
    for words in ("Step 1", "not taken", "first in model.layers.1", "of 2"):
        assert words in str(caught.value)


def test_both_kinds_of_step_tell_the_same_of_a_damaged_row(
    run_job: Callable[..., tuple[TrainResult, Path, Decoder]],
) -> None:
    def damage(model: Decoder) -> None:
        with torch.no_grad():
            model.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1e38)

    messages = []
    for fast in (True, False):
        lora = LoRAConfig(rank=4, init_seed=0)
        with pytest.raises(TrainingError) as caught:
            run_job(f"run-{fast}", fast=fast, lora=lora, damage=damage)
        messages.append(str(caught.value).split("damaged examples. ")[1])
    assert messages[0] == messages[1]
    assert "up_proj (sequence 1, 2 of 2), micro-batch 1 of 2" in messages[0]


@pytest.mark.parametrize("lora", [LoRAConfig(rank=4, init_seed=0), None], ids=["lora", "full"])
def test_the_best_weights_are_in_the_model_at_the_end(
    run_job: Callable[..., tuple[TrainResult, Path, Decoder]],
    make_batch: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
    lora: LoRAConfig | None,
) -> None:
    losses: list[float] = []
    evaluate = FastStepRunner.evaluate

    def rising(runner: FastStepRunner, batches: Iterable[Any]) -> list[float]:
        losses.extend(evaluate(runner, batches))
        return [100.0 + len(losses)]  # after steps 0, 4, 8 and 12

    monkeypatch.setattr(FastStepRunner, "evaluate", rising)
    result, _, model = run_job("run", fast=True, lora=lora)
    assert (result.saved_step, result.saved_eval_loss) == (4, 102.0)
    # The model's parameters are views of the step's own tensors, and hold the values of step 4.
    loss_sum, n_tokens = loss_for(model)(model.eval(), make_batch(1000, packed=True))
    assert (loss_sum / n_tokens).item() == pytest.approx(losses[1], rel=1e-6)
    assert losses[1] != pytest.approx(losses[3], rel=1e-3)
