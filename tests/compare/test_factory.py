"""A comparison of models that a factory builds: what is measured, and what it is not asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora.adapters.apply import apply_lora
from lora.compare import compare
from lora.compare.config import CompareConfig, LearningRates
from lora.compare.factory import FactoryTarget, MemberSetup
from lora.config import LoRAConfig, RunConfig, TrainConfig
from lora.device import choose_device
from lora.errors import ConfigError
from lora.runs.comparison_record import Sample
from lora.runs.progress import NoProgress
from lora.runs.record import Method

Pair = tuple[Tensor, Tensor]


class Numbers:
    """Endless pairs (x, y) of a linear map; row n depends on the seed and n alone."""

    def __init__(self, seed: int, rows: int) -> None:
        self.seed, self.rows, self.row = seed, rows, 0

    def __next__(self) -> Pair:
        draws = [self._draw(self.row + n) for n in range(self.rows)]
        self.row += self.rows
        x = torch.stack(draws)
        return x, x.flip(1)

    def _draw(self, row: int) -> Tensor:
        return torch.randn(8, generator=torch.Generator().manual_seed(1000 * self.seed + row))

    def state_dict(self) -> dict[str, Any]:
        return {"row": self.row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.row = int(state["row"])


def squares(model: nn.Module, batch: Pair) -> tuple[Tensor, Tensor]:
    x, y = batch
    return ((model(x) - y) ** 2).sum()[None], torch.tensor([len(x)])


@dataclass(frozen=True)
class Linears:
    base_name: str = "two linears"

    def described(self) -> dict[str, Any]:
        return {"base": self.base_name}

    def build(self, method: Method, train: TrainConfig) -> MemberSetup:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        if method == "lora":
            apply_lora(model, LoRAConfig(rank=2, init_seed=train.seed))

        def save(folder: Path) -> None:
            folder.mkdir()
            trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
            save_file(trained, folder / "trained.safetensors")

        return MemberSetup(
            model=model,
            loss_fn=squares,
            stream=Numbers(train.seed, train.batch_size),
            eval_batches=lambda: [next(Numbers(99, 32))],
            choice=choose_device("cpu"),
            save=save,
            forgetting=("the same numbers", lambda: [(x, x) for x, _ in [next(Numbers(98, 32))]]),
            answer=lambda: [Sample("1", None, f"{model(torch.ones(1, 8)).sum():.3f}")],
            metric=("right", lambda: float(squares(model, next(Numbers(97, 8)))[0] < 1e3)),
            weight_decay=0.5 if method == "full" else None,
        )


@pytest.fixture
def config(tmp_path: Path) -> CompareConfig:
    return CompareConfig(
        train=TrainConfig(steps=30, batch_size=4),
        run=RunConfig(out=tmp_path, name="run"),
        rates=LearningRates(rates=(1e-2, 1e-9), full_rates=(1e-2, 1e-9)),
        isolated=False,
    )


def test_what_the_factory_measures_stands_in_the_record(config: CompareConfig) -> None:
    done = compare(FactoryTarget(Linears()), config)
    lora, full = done.comparison.members
    assert (lora.trainable_parameters, lora.total_parameters) == (64, 208)
    assert full.trainable_parameters == full.total_parameters == 144
    assert lora.learning_rate == full.learning_rate == 1e-2
    before = done.comparison.base_eval_loss
    assert before is not None
    for member in (lora, full):
        assert member.final_eval_loss < before
        assert member.forgetting is not None
        assert member.forgetting.text == "the same numbers"
        assert member.forgetting.after != member.forgetting.before
        assert member.task_metric is not None
        assert (member.task_metric.name, member.task_metric.after) == ("right", 1.0)
        assert member.samples[0].answer != done.comparison.base_samples[0].answer
    assert lora.stored_bytes < full.stored_bytes
    assert done.comparison.rate_steps == 20


def test_a_restart_continues_the_comparison_and_another_name_is_told(
    config: CompareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Told(NoProgress):
        def message(self, message: str) -> None:
            told.append(message)

    def run(restart: int) -> Path:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
        return compare(FactoryTarget(Linears()), config, lambda title: Told()).folder

    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    folder = run(0)
    told.clear()
    assert run(1) == folder
    assert told == [f"restart 1 of 2: resuming {folder}"]
    with pytest.raises(ConfigError, match="it exists"):
        run(0)
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS")
    assert run(0).name == "run-2"
    assert any("run exists: this run is" in text for text in told)


def test_peft_is_not_built_by_a_factory(config: CompareConfig) -> None:
    with pytest.raises(ConfigError, match="--peft"):
        compare(FactoryTarget(Linears()), replace(config, methods=("lora", "full", "peft")))
