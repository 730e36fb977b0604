"""Whole runs over a base in nf4 on a CPU: what is learned, kept, planned, resumed and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora.adapters.save_load import load_adapter
from lora.cli import main
from lora.config import BaseWeights, DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.decoder.quantised.base import quantised_modules
from lora.errors import ConfigError, LoraError, TargetError
from lora.finetune import FinetuneJob, finetune
from lora.finetune import run as run_module
from lora.pretrained.hf_weights import load_decoder
from lora.runs.disk import read_json, read_rows
from lora.runs.read_record import read_run_record
from tests.heard import Heard

NF4 = BaseWeights("nf4")
TOKENS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def job(tiny_folder: Path, tmp_path: Path) -> FinetuneJob:
    return FinetuneJob(
        data=make_orders("train", 24),
        model=str(tiny_folder),
        lora=LoRAConfig(rank=4, dropout=0.1),
        train=TrainConfig(steps=6, batch_size=4, gradient_accumulation=2, learning_rate=2e-2),
        data_config=DataConfig(max_length=128),
        run=RunConfig(out=tmp_path, name="run", eval_every_steps=3, save_every_steps=3),
        base_dtype="nf4",
    )


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_it_learns_and_leaves_the_base_as_it_was(
    job: FinetuneJob, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    load = run_module.load_model

    def loaded(*args: object) -> object:
        found = load(*args)  # type: ignore[arg-type]
        kept.append(found[0])
        return found

    monkeypatch.setattr(run_module, "load_model", loaded)
    done = finetune(job)
    rows = read_rows(done.folder / "metrics.jsonl")
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert losses[-1] < losses[0] - 0.02
    described = read_json(done.folder / "run.json")
    assert described["base_dtype"] == "nf4"
    assert described["nf4"] == NF4.nf4_settings
    fresh = quantised_modules(load_decoder(tiny_folder, base=NF4))
    trained = quantised_modules(kept[0])
    assert len(trained) == 2 * 7
    for name, layer in fresh.items():
        assert torch.equal(trained[name].weight, layer.weight)
        for key in layer.packed_names:
            assert torch.equal(trained[name].get_buffer(key), layer.get_buffer(key))


def test_its_adapter_loads_on_any_base_and_trains_on(job: FinetuneJob, tiny_folder: Path) -> None:
    done = finetune(job)
    outputs = []
    for base in (NF4, BaseWeights()):
        model = load_decoder(tiny_folder, base=base)
        load_adapter(model, done.saved)
        with torch.no_grad():
            outputs.append(model(TOKENS))
    difference = (outputs[0] - outputs[1]).norm() / outputs[1].norm()
    assert 0 < difference < 1  # logits that have nothing in common are √2 apart
    more = replace(job, lora=None, from_adapter=done.saved, run=replace(job.run, name="more"))
    again = finetune(more)
    first = next(row for row in read_rows(again.folder / "metrics.jsonl") if "eval_loss" in row)
    assert first["eval_loss"] == pytest.approx(done.result.eval_loss, rel=1e-6)


def test_an_adapter_is_trained_on_over_the_base_that_it_had(
    job: FinetuneJob, caplog: pytest.LogCaptureFixture
) -> None:
    short = replace(job, train=replace(job.train, steps=1), run=replace(job.run, samples=0))
    first = finetune(replace(short, nf4_block=32, nf4_double_quant=False, nf4_embeddings=True))
    more = replace(short, lora=None, from_adapter=first.saved)
    records = {}
    for word in ("auto", "original", "int8"):
        own = replace(more, base_dtype=word, run=replace(more.run, name=word))
        heard = Heard()
        caplog.clear()
        done = finetune(own, heard)
        is_said = any(f"as {first.saved} was trained" in each for each in heard.said)
        assert is_said == (word == "auto")
        assert ("was trained over" in caplog.text) == (word != "auto")
        finetune(replace(own, train=replace(own.train, steps=2), resume=True))
        records[word] = read_run_record(done.folder)
    settings = {"nf4_block": 32, "nf4_double_quant": False, "nf4_embeddings": True}
    assert (records["auto"].base_dtype, records["auto"].nf4) == ("nf4", settings)
    assert [records[word].base_dtype for word in ("original", "int8")] == [None, "int8"]


def test_a_resumed_run_ends_with_the_same_bytes(job: FinetuneJob, tmp_path: Path) -> None:
    constant = replace(
        job,
        train=replace(job.train, steps=4, schedule="constant"),
        data_config=replace(job.data_config, special_tokens=("<|tool|>",)),
        run=replace(job.run, save_every_steps=2),
    )
    finetune(replace(constant, train=replace(constant.train, steps=2)))
    whole = finetune(replace(constant, run=replace(constant.run, out=tmp_path / "whole")))
    resumed = finetune(replace(constant, resume=True))
    assert weights(whole.saved) == weights(resumed.saved)
    other = replace(constant.run, out=tmp_path / "again")
    deterministic = finetune(replace(constant, run=other, deterministic=True))
    assert weights(deterministic.saved) == weights(whole.saved)


@pytest.mark.parametrize("change", [{"base_dtype": "auto"}, {"nf4_block": 128}])
def test_a_run_cannot_be_resumed_over_another_base(
    job: FinetuneJob, change: dict[str, object]
) -> None:
    short = replace(job, train=replace(job.train, steps=1), run=replace(job.run, samples=0))
    finetune(short)
    longer = replace(short, train=replace(short.train, steps=2), resume=True)
    with pytest.raises(LoraError, match=next(iter(change))):
        finetune(replace(longer, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda job: replace(job, lora=None), r"nf4' with full fine-tuning.*Train with LoRA"),
        (lambda job: replace(job, nf4_block=48), r"nf4_block=48: must be one of 32, 64"),
        (
            lambda job: replace(job, base_dtype="auto", nf4_double_quant=False),
            r"nf4_double_quant=False with base_dtype='auto'.*Add base_dtype=nf4.*already has its",
        ),
        (
            lambda job: replace(
                job, lora=LoRAConfig(targets=("q_proj",), modules_to_save=("mlp",))
            ),
            r"'model\.layers\.0\.mlp' fully \(modules_to_save\).*stored in nf4",
        ),
    ],
)
def test_what_nf4_cannot_do_is_refused_by_name(
    job: FinetuneJob, change: Callable[[FinetuneJob], FinetuneJob], words: str
) -> None:
    with pytest.raises((ConfigError, TargetError), match=words):
        finetune(change(job))
    assert not job.directory.exists()


def test_the_command_plans_it(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plans = {}
    for kind in ("auto", "nf4"):
        flags = ["--model", str(tiny_folder), "--device", "cpu", "--base-dtype", kind, "--json"]
        flags += ["--memory-gb", "0.01"]  # no search for the largest batch
        assert main(["plan", *flags]) == 0
        plans[kind] = json.loads(capsys.readouterr().out)
    sizes = {kind: plan["lora"]["weights"] for kind, plan in plans.items()}
    assert sizes["nf4"] < sizes["auto"]
    counts = {kind: plan["lora"]["parameters"] for kind, plan in plans.items()}
    assert counts["nf4"] == counts["auto"]
    assert plans["nf4"]["full"]["weights"] == plans["auto"]["full"]["weights"]
