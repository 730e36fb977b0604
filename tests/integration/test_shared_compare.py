"""A comparison in two processes: each member trained together, the same results as in one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lora.compare import compare
from lora.compare.config import CompareConfig, LearningRates
from lora.compare.decoder_job import EvaluationConfig
from lora.compare.decoder_target import DecoderTarget
from lora.compare.factory import FactoryTarget
from lora.compare.sweep_full import FullRecord, sweep_with_full
from lora.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.distributed.world import World
from lora.errors import ConfigError
from lora.runs.comparison_record import Comparison, read_comparison
from lora.runs.disk import read_json, read_rows
from lora.sweep import SweepJob
from lora.sweep.grid import Grid
from lora.sweep.progress import NoSweepProgress
from tests.distributed.processes import run_processes

WEIGHTS = {
    "lora": Path("adapter/adapter_model.safetensors"),
    "full": Path("model/model.safetensors"),
}


SEEN = ("isolated=False", "a micro-batch has 1", "PEFT", "factory")


@pytest.fixture
def target(tiny_folder: Path) -> DecoderTarget:
    return DecoderTarget(
        data=make_orders("train", 24),
        model=str(tiny_folder),
        eval_data=make_orders("validation", 6),
        lora=LoRAConfig(rank=4, dropout=0.1),
        data_config=DataConfig(max_length=160),
        evaluation=EvaluationConfig(
            forgetting_data=[{"text": "the sea was calm that night " * 20}],
            metric="exact-match", answers=3, answer_tokens=4,
        ),
    )  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> CompareConfig:
    return CompareConfig(
        train=TrainConfig(steps=6, batch_size=4),
        run=RunConfig(out=tmp_path, name="alone", eval_every_steps=3, sample_tokens=4),
        rates=LearningRates(rates=(5e-3, 1e-2), rate_steps=3),
        isolated=False,
    )


def compare_shared(
    world: World, target: DecoderTarget, config: CompareConfig
) -> tuple[Comparison, list[str]]:
    refused = []
    few = replace(config, isolated=True, train=TrainConfig(steps=6, batch_size=1))
    for wrong, settings in (
        (target, config),
        (target, few),
        (target, replace(config, methods=("lora", "full", "peft"))),
        (FactoryTarget(None), config),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError) as caught:
            compare(wrong, settings)
        refused.append(str(caught.value))
    shared = replace(config, isolated=True, run=replace(config.run, name="shared"))
    return compare(target, shared).comparison, refused


def sweep_shared(world: World, job: SweepJob) -> list[FullRecord]:
    """Sweep with full fine-tuning, and then once more, which finds all of it done."""
    return [
        sweep_with_full(replace(job, resume=resume), NoSweepProgress())[1].record
        for resume in (False, True)
    ]


@pytest.mark.slow
def test_full_fine_tuning_beside_a_sweep_is_of_all_processes(
    target: DecoderTarget, config: CompareConfig, tmp_path: Path
) -> None:
    job = SweepJob(
        data=target.data,
        grid=Grid(rank=(2, 4)),
        model=target.model,
        train=config.train,
        data_config=target.data_config,
        run=config.run,
    )
    _, alone = sweep_with_full(job, NoSweepProgress())
    shared = replace(job, run=replace(job.run, name="shared"))
    first, second = run_processes(2, sweep_shared, shared, timeout_s=300)
    assert first == second == 2 * first[:1]
    assert first[0].candidate.eval_loss == pytest.approx(alone.record.candidate.eval_loss, rel=1e-4)
    assert read_json(tmp_path / "shared" / "full" / "run.json")["world_size"] == 2


@pytest.mark.slow
def test_two_processes_compare_as_one_does(
    target: DecoderTarget, config: CompareConfig, tmp_path: Path
) -> None:
    alone = compare(target, config).comparison
    (first, refused), (second, refused_too) = run_processes(
        2, compare_shared, target, config, timeout_s=300
    )
    assert first == second == read_comparison(tmp_path / "shared")
    assert [m.learning_rate for m in first.members] == [m.learning_rate for m in alone.members]
    for own, wanted in zip(first.members, alone.members, strict=True):
        assert own.final_eval_loss == pytest.approx(wanted.final_eval_loss, rel=1e-4)
        assert own.task_metric == wanted.task_metric
        shared, plain = (tmp_path / name / "members" / own.method for name in ("shared", "alone"))
        rows, expected = (read_rows(path / "metrics.jsonl") for path in (shared, plain))
        assert [row["step"] for row in rows] == [row["step"] for row in expected]
        assert read_json(shared / "run.json")["world_size"] == 2
        tensors, plain_tensors = (load_file(path / WEIGHTS[own.method]) for path in (shared, plain))
        for name, tensor in plain_tensors.items():
            assert (tensors[name] - tensor).norm() <= 1e-3 * tensor.norm(), (own.method, name)
    assert first.base_eval_loss == pytest.approx(alone.base_eval_loss, rel=1e-6)
    assert list(refused) == list(refused_too)
    for text, seen in zip(refused, SEEN, strict=True):
        assert seen in text
