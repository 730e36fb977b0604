"""`import lora` from fine-tuning to a file for another program, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lora
from lora.config import MemoryConfig
from lora.errors import ConfigError, UnknownSettingError
from lora.finetune import FinetuneJob, FinetuneResult
from lora.finetune.from_settings import build_job


@pytest.fixture(scope="module")
def done(tiny_folder: Path, orders_file: Path, tmp_path_factory: Any) -> FinetuneResult:
    out = str(tmp_path_factory.mktemp("runs"))
    settings: dict[str, Any] = {"steps": 4, "batch_size": 2, "rank": 4, "max_length": 128}
    return lora.finetune(str(orders_file), model=str(tiny_folder), out=out, name="mine", **settings)


def test_settings_reach_their_groups(done: FinetuneResult) -> None:
    assert done.result.steps == 4
    assert done.folder.name == "mine"
    assert lora.load_model  # loaded on first use
    from lora.adapters.save_load import read_adapter_config

    assert read_adapter_config(done.saved).rank == 4


def test_a_job_gives_the_same_bytes_as_its_settings(
    done: FinetuneResult, tiny_folder: Path, orders_file: Path, tmp_path: Path
) -> None:
    job = FinetuneJob(
        data=orders_file,
        model=str(tiny_folder),
        lora=lora.LoRAConfig(rank=4),
        train=lora.TrainConfig(steps=4, batch_size=2),
        data_config=lora.DataConfig(max_length=128),
        run=lora.RunConfig(out=tmp_path, name="again"),
    )
    again = lora.finetune(job)
    name = "adapter_model.safetensors"
    assert (again.saved / name).read_bytes() == (done.saved / name).read_bytes()
    with pytest.raises(ConfigError, match="Cannot use rank beside a FinetuneJob"):
        lora.finetune(job, rank=8)


def test_the_adapter_answers_is_evaluated_exported_and_merged(
    done: FinetuneResult, tiny_folder: Path, orders_file: Path, tmp_path: Path
) -> None:
    model, tokenizer = lora.load_model(tiny_folder, adapter=done.saved, device="cpu")
    answer = lora.generate(model, tokenizer, "3 lamps", max_new_tokens=4)
    assert isinstance(answer, str)
    scores = lora.evaluate(model, tokenizer, orders_file).scores
    assert scores.max_length == 128  # as in the run
    base = lora.evaluate(*lora.load_model(tiny_folder), orders_file).scores
    assert scores.loss < base.loss
    with lora.disabled_adapter(model):
        assert lora.evaluate(model, tokenizer, orders_file, max_length=512).scores == base
    report = lora.export(tmp_path / "a.gguf", model=tiny_folder, adapter=done.saved, dtype="f32")
    in_memory = lora.export(tmp_path / "b.gguf", model=model, tokenizer=tokenizer, dtype="f32")
    assert report.errors.keys() == in_memory.errors.keys()
    merged = lora.merge(done.saved, tmp_path / "merged", model=tiny_folder)
    assert merged.layers == 14
    plain, same = lora.load_model(tmp_path / "merged")
    assert lora.generate(plain, same, "3 lamps", max_new_tokens=4) == answer
    weights = tmp_path / "merged" / "model.safetensors"
    before = weights.read_bytes()
    with pytest.raises(ConfigError, match="Cannot write"):  # what it was loaded from
        lora.export(weights, model=plain, tokenizer=same, overwrite=True)
    assert weights.read_bytes() == before


def test_a_model_in_memory_trains_to_the_same_bytes_as_by_name(
    done: FinetuneResult, tiny_folder: Path, orders_file: Path, tmp_path: Path
) -> None:
    model, tokenizer = lora.load_model(tiny_folder, device="cpu")
    lora.apply_lora(model, lora.LoRAConfig(rank=4, init_seed=lora.TrainConfig().seed))
    settings: dict[str, Any] = {"steps": 4, "batch_size": 2, "max_length": 128, "out": tmp_path}
    trained = lora.train(model, tokenizer, orders_file, name="x", **settings)
    name = "adapter_model.safetensors"
    assert (trained.saved / name).read_bytes() == (done.saved / name).read_bytes()
    assert trained.result.eval_loss == done.result.eval_loss
    answer = lora.generate(model, tokenizer, "3 lamps", max_new_tokens=4)
    loaded = lora.load_model(tiny_folder, adapter=trained.saved, device="cpu")
    assert lora.generate(*loaded, "3 lamps", max_new_tokens=4) == answer


class Hearing(lora.Callback):
    """Keeps the steps and evaluations that it was called after."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []

    def on_step(self, event: lora.StepEvent) -> None:
        self.heard.append(("step", event.step))

    def on_eval(self, event: lora.EvalEvent) -> None:
        self.heard.append(("eval", event.step))


def test_callbacks_of_a_model_by_name_hear_the_run(
    tiny_folder: Path, orders_file: Path, tmp_path: Path
) -> None:
    hearing = Hearing()
    settings: dict[str, Any] = {"steps": 2, "batch_size": 2, "eval_data": str(orders_file)}
    lora.finetune(
        str(orders_file), model=str(tiny_folder), out=tmp_path, callbacks=hearing, **settings
    )
    assert hearing.heard == [("eval", 0), ("step", 1), ("step", 2), ("eval", 2)]


def test_export_refuses_what_it_would_ignore(done: FinetuneResult, tiny_folder: Path) -> None:
    model, tokenizer = lora.load_model(tiny_folder)
    with pytest.raises(ConfigError, match="a model in memory with adapter="):
        lora.export("x.gguf", model=model, tokenizer=tokenizer, adapter=done.saved)
    with pytest.raises(ConfigError, match="with tokenizer="):
        lora.export("x.gguf", model=tiny_folder, tokenizer=tokenizer)


def test_every_field_is_a_setting() -> None:
    job = build_job(
        "x.jsonl",
        {
            **{"rank": 3, "steps": 5, "max_length": 99, "name": "n", "memory": "full"},
            **{"model": "m", "resume": True, "eval_data": "v.jsonl", "base_dtype": "fp8"},
        },
    )
    assert (job.lora and job.lora.rank, job.train.steps, job.data_config.max_length) == (3, 5, 99)
    assert (job.run.name, job.memory, job.model) == ("n", MemoryConfig(memory="full"), "m")
    assert (job.resume, job.eval_data, job.base_dtype) == (True, "v.jsonl", "fp8")
    group = build_job("x", {"memory": MemoryConfig(memory="cheap"), "memory_gb": 4})
    assert group.memory == MemoryConfig(memory="cheap", memory_gb=4)
    former = build_job("x", {"micro_batches": 2})
    assert former.train.gradient_accumulation == 2
    both = build_job("x", {"train": lora.TrainConfig(steps=7), "batch_size": 2})
    assert (both.train.steps, both.train.batch_size) == (7, 2)
    assert build_job("x", {"full": True}).is_full
    assert build_job("x", {"lora": None}).is_full
    assert build_job("x", {"from_adapter": "a"}).from_adapter == Path("a")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 8}, "there is no setting 'r': here it is 'rank'"),
        ({"output_dir": "x/y"}, "Write out=x, name=y"),
        ({"gradient_accumulation": 2, "micro_batches": 2}, "is the former name of"),
        ({"setps": 8}, "Did you mean 'steps'"),
        ({"full": True, "rank": 8}, "Cannot combine full with LoRA settings .rank"),
        ({"lora": None, "rank": 8}, "Cannot combine full with LoRA settings .rank"),
        ({"from_adapter": "a", "rank": 8}, "Cannot combine from_adapter with LoRA settings"),
        ({"full": 1}, "full=1"),
        ({"train": None}, "Cannot use train=None. Allowed: a TrainConfig"),
        ({"lora": "big"}, "Cannot use lora='big'. Allowed: a LoRAConfig, or None"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        build_job("x.jsonl", settings)
    is_known = set(settings) & {"full", "lora", "from_adapter", "train", "steps", "micro_batches"}
    assert isinstance(caught.value, UnknownSettingError) is not bool(is_known)
