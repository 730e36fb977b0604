"""Whole runs over a base in fp8 on a CPU: what is learned, kept, planned, resumed and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora.adapters.save_load import load_adapter
from lora.cli import main
from lora.config import BaseWeights, DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.errors import ConfigError, LoraError
from lora.finetune import FinetuneJob, finetune
from lora.pretrained.hf_weights import load_decoder
from lora.runs.disk import read_json, read_rows

TOKENS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def job(tiny_folder: Path, tmp_path: Path) -> FinetuneJob:
    return FinetuneJob(
        data=make_orders("train", 24),
        model=str(tiny_folder),
        lora=LoRAConfig(rank=4),
        train=TrainConfig(steps=12, batch_size=4, gradient_accumulation=2, learning_rate=2e-2),
        data_config=DataConfig(max_length=128),
        run=RunConfig(out=tmp_path, name="run", eval_every_steps=4, save_every_steps=3),
        base_dtype="fp8",
    )


def test_it_learns_as_over_the_base_as_it_is(job: FinetuneJob, tmp_path: Path) -> None:
    done = finetune(job)
    plain = replace(job.run, out=tmp_path / "plain")
    other = finetune(replace(job, base_dtype="auto", run=plain))
    losses = [
        row["eval_loss"] for row in read_rows(done.folder / "metrics.jsonl") if "eval_loss" in row
    ]
    assert losses[-1] < losses[0] - 0.05
    assert done.result.eval_loss == pytest.approx(other.result.eval_loss, rel=0.05)
    described, others = (read_json(d.folder / "run.json") for d in (done, other))
    assert described["base_dtype"] == "fp8"
    assert "base_dtype" not in others
    assert described["base_fingerprint"] == others["base_fingerprint"]


def test_its_adapter_loads_on_the_base_as_it_is(job: FinetuneJob, tiny_folder: Path) -> None:
    done = finetune(job)
    outputs = []
    for base in (BaseWeights("fp8"), BaseWeights()):
        model = load_decoder(tiny_folder, base=base)
        load_adapter(model, done.saved)
        with torch.no_grad():
            outputs.append(model(TOKENS))
    difference = (outputs[0] - outputs[1]).norm() / outputs[1].norm()
    assert 0 < difference < 0.1


def test_a_resumed_run_ends_with_the_same_bytes(job: FinetuneJob, tmp_path: Path) -> None:
    constant = replace(job, train=replace(job.train, steps=6, schedule="constant"))
    finetune(replace(constant, train=replace(constant.train, steps=3)))
    whole = finetune(replace(constant, run=replace(job.run, out=tmp_path / "whole")))
    resumed = finetune(replace(constant, resume=True))
    one, other = (d.saved / "adapter_model.safetensors" for d in (whole, resumed))
    assert one.read_bytes() == other.read_bytes()


def test_a_run_cannot_be_resumed_over_another_kind_of_base(job: FinetuneJob) -> None:
    finetune(job)
    longer = replace(job, train=replace(job.train, steps=14), resume=True, base_dtype="auto")
    with pytest.raises(LoraError, match="base_dtype"):
        finetune(longer)


def test_full_fine_tuning_and_unknown_kinds_are_refused(job: FinetuneJob) -> None:
    with pytest.raises(ConfigError, match=r"full fine-tuning.*Train with LoRA"):
        finetune(replace(job, lora=None))
    with pytest.raises(ConfigError, match=r"'fp9'\. Allowed: auto, fp8.*mean 'fp8'"):
        finetune(replace(job, base_dtype="fp9"))  # type: ignore[arg-type]


def test_the_command_plans_it(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plans = {}
    for kind in ("auto", "fp8"):
        flags = ["--model", str(tiny_folder), "--device", "cpu", "--base-dtype", kind, "--json"]
        flags += ["--memory-gb", "0.01"]  # no search for the largest batch
        assert main(["plan", *flags]) == 0
        plans[kind] = json.loads(capsys.readouterr().out)
    weights = {kind: plan["lora"]["weights"] for kind, plan in plans.items()}
    assert weights["fp8"] < weights["auto"]
    assert plans["fp8"]["full"]["weights"] == plans["auto"]["full"]["weights"]
