"""Models that transformers runs, over a base in nf4: trained and planned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lora.config import BaseWeights, DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.decoder.quantised.base import quantised_modules
from lora.finetune.job import FinetuneJob
from lora.finetune.run import finetune
from lora.pretrained.transformers_models.load import load_transformers_model
from lora.runs.disk import read_json
from tests.integration.test_any_model import multimodal, run, save_model

pytest.importorskip("transformers")


NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
"""A native decoder has none."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job_on(folder: Path, orders_file: Path, here: Path) -> FinetuneJob:
    return FinetuneJob(
        data=orders_file,
        model=str(folder),
        lora=LoRAConfig(rank=2, targets="all-linear"),
        train=TrainConfig(steps=4, batch_size=2, learning_rate=2e-2),
        data_config=DataConfig(max_length=96),
        run=RunConfig(out=here, name="run", samples=0),
        implementation="transformers",
        base_dtype="nf4",
    )


def test_a_gpt2_trains_over_nf4_as_the_native_decoder_does(orders_file: Path, here: Path) -> None:
    job = job_on(save_model(here / "gpt2", "gpt2", **NO_DROPOUT), orders_file, here)
    theirs = finetune(job)
    native = finetune(replace(job, implementation="native", run=replace(job.run, name="native")))
    assert theirs.result.best_eval_loss < theirs.result.start_eval_loss
    assert abs(native.result.eval_loss - theirs.result.eval_loss) < 1e-4
    one, two = (load_file(d.saved / "adapter_model.safetensors") for d in (native, theirs))
    assert one.keys() == two.keys()
    plain = finetune(replace(job, base_dtype="auto", run=replace(job.run, name="plain")))
    assert abs(plain.result.start_eval_loss - theirs.result.start_eval_loss) > 1e-4


def test_of_a_multimodal_model_the_text_part_is_in_nf4(orders_file: Path, here: Path) -> None:
    done = finetune(job_on(multimodal(here / "gemma3"), orders_file, here))
    assert read_json(done.folder / "run.json")["base_dtype"] == "nf4"
    assert done.result.best_eval_loss < done.result.start_eval_loss


def test_a_plan_has_the_bytes_of_packed_weights(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(here / "neox", "gpt_neox")
    words = "plan --json --max-length 64 --device cpu --rank 1 --model"
    found = {}
    for kind in ("auto", "nf4"):
        assert run(f"{words} {folder} --base-dtype {kind}") == 0
        found[kind] = json.loads(capsys.readouterr().out)["lora"]
    model = load_transformers_model(folder, base=BaseWeights(base_dtype="nf4"))
    stored = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    stored -= sum(module.sample.nbytes for module in quantised_modules(model).values())
    plan = found["nf4"]
    assert plan["weights"] == stored + 4 * plan["trained_parameters"]
    assert plan["parameters"] == found["auto"]["parameters"]
