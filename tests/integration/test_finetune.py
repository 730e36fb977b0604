"""Whole fine-tuning runs on a tiny model: what is saved, what stays, what is refused."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora.adapters.apply import apply_lora
from lora.adapters.save_load import load_adapter
from lora.cli import main
from lora.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.data.inspection_report import DataReport
from lora.data.prepare import prepare_data
from lora.data.reading.orders import make_orders
from lora.data.sequences.batches import BatchStream, ordered_batches
from lora.data.tokenizers.subword import load_tokenizer
from lora.decoder.decoder import Decoder
from lora.device import choose_device
from lora.errors import CheckpointError, DataError, LoraError, ModelError
from lora.fast.choose import choose_steps
from lora.finetune import FinetuneJob, FinetuneResult, finetune
from lora.finetune.model import load_model
from lora.pretrained.hf_weights import load_decoder
from lora.pretrained.transformers_models.load import as_language_model
from lora.runs.directory import create_run
from lora.runs.disk import read_json, read_rows
from lora.training.job import TrainingJob
from lora.training.losses import loss_for
from lora.training.trainer import train
from tests.heard import Heard

PEFTS_OWN = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
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
    )


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = load_decoder(folder)
    if adapter is not None:
        load_adapter(model, adapter)
    with torch.no_grad():
        return model(TOKENS)


def test_it_learns_and_leaves_a_whole_folder(job: FinetuneJob, tiny_folder: Path) -> None:
    before = (tiny_folder / "model.safetensors").read_bytes()
    done = finetune(job)
    rows = read_rows(done.folder / "metrics.jsonl")
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert losses[-1] < losses[0] - 0.05
    assert done.result.eval_loss == losses[-1]
    assert (tiny_folder / "model.safetensors").read_bytes() == before
    described = read_json(done.folder / "run.json")
    assert described["lora"]["rank"] == 4
    assert described["learning_rate"] == 2e-2
    assert described["base_fingerprint"]
    assert read_json(done.folder / "result.json")["steps"] == 12
    assert load_tokenizer(done.saved).chat_template is not None


def test_nothing_holds_the_model_when_the_run_has_ended(
    job: FinetuneJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[weakref.ref[torch.nn.Module]] = []

    def load(*arguments: Any) -> tuple[Decoder, str]:
        model, fingerprint = load_model(*arguments)
        trained.append(weakref.ref(model))
        return model, fingerprint

    monkeypatch.setattr("lora.finetune.run.load_model", load)
    gc.disable()  # else the garbage collector may come by itself
    try:
        finetune(job)
    finally:
        gc.enable()
    assert trained[0]() is None


@PEFTS_OWN
def test_peft_loads_the_adapter_with_equal_logits(job: FinetuneJob, tiny_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    done = finetune(job)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, done.saved)
    with torch.no_grad():
        theirs = model(TOKENS).logits
    ours = logits(tiny_folder, done.saved)
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - logits(tiny_folder)).abs().max() > 0.01


def strip(result: FinetuneResult) -> tuple[bytes, bytes, bytes]:
    adapter = (result.saved / "adapter_model.safetensors").read_bytes()
    samples = (result.folder / "samples.jsonl").read_bytes()
    return adapter, (result.folder / "metrics.jsonl").read_bytes(), samples


def test_a_killed_run_that_is_resumed_ends_with_the_same_bytes(
    job: FinetuneJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finetune(replace(job, run=replace(job.run, out=tmp_path / "whole")))

    class Killed(Exception):
        pass

    steps: list[int] = []

    class Fragile:
        def start(self, total_steps: int, done_steps: int) -> None: ...
        def message(self, message: str) -> None: ...
        def stop(self) -> None: ...
        def step(self, step: int, loss: float, tokens_per_s: float, memory_bytes: int) -> None:
            steps.append(step)
            if steps == [1, 2, 3, 4, 5, 6, 7]:
                raise Killed

    with pytest.raises(Killed):
        finetune(job, Fragile())
    resumed = finetune(replace(job, resume=True), Fragile())
    assert steps[7:] == [7, 8, 9, 10, 11, 12]
    assert strip(resumed) == strip(whole)


def test_samples_are_kept_at_each_evaluation_and_change_nothing(job: FinetuneJob) -> None:
    job = replace(job, lora=LoRAConfig(rank=4, dropout=0.2))  # what draws could disturb
    done = finetune(replace(job, run=replace(job.run, samples=1, sample_tokens=5)))
    rows = read_rows(done.folder / "samples.jsonl")
    assert [row["step"] for row in rows] == [0, 4, 8, 12]
    assert all(row["prompt"] and row["reference"] and row["tokens"] <= 5 for row in rows)
    without = finetune(replace(job, run=replace(job.run, samples=0, name="without")))
    assert not (without.folder / "samples.jsonl").exists()
    for file in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (done.folder / file).read_bytes() == (without.folder / file).read_bytes()


def test_samples_that_fail_leave_the_run_alone(
    job: FinetuneJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr("lora.inference.samples.generate", full)
    heard = Heard()
    done = finetune(job, heard)
    assert done.result.steps == 12
    assert sum("no memory left" in line for line in heard.said) == 1


def test_going_on_from_an_adapter_starts_where_it_ended(job: FinetuneJob) -> None:
    first = finetune(job)
    slower = replace(job.train, learning_rate=5e-3)  # or the warm-up's jump may undo what was won
    more = finetune(
        replace(
            job,
            lora=None,
            from_adapter=first.saved,
            train=slower,
            run=replace(job.run, name="more"),
        ),
    )
    start = next(r["eval_loss"] for r in read_rows(more.folder / "metrics.jsonl") if not r["step"])
    assert start == pytest.approx(first.result.eval_loss, rel=1e-6)
    assert more.result.eval_loss < first.result.eval_loss


def test_full_fine_tuning_saves_a_model(job: FinetuneJob, tiny_folder: Path) -> None:
    train_config = replace(job.train, learning_rate=1e-2)
    done = finetune(replace(job, lora=None, train=train_config))
    assert done.saved.name == "model"
    assert (logits(done.saved) - logits(tiny_folder)).abs().max() > 0.01


def test_the_loss_does_not_depend_on_packing_padding_or_the_split(
    job: FinetuneJob, tiny_folder: Path
) -> None:
    tokenizer, model = load_tokenizer(tiny_folder), load_decoder(tiny_folder)
    apply_lora(model, LoRAConfig(rank=4, init_seed=0))
    losses = []
    for packing, rows in ((True, 1), (True, 3), (False, 1), (False, 5)):
        config = DataConfig(max_length=192, packing=packing, eval_fraction=0.0)
        data = prepare_data(make_orders("train", 12), tokenizer, config, 0)
        total = count = 0.0
        with torch.no_grad():
            for batch in ordered_batches(data.train, rows):
                loss, n_tokens = loss_for(model)(model, batch)
                total, count = total + loss.item(), count + n_tokens.item()
        losses.append(total / count)
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"data": [{"txt": "hello"}]}, "row 1"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"model": "nowhere"}, "no such folder or file"),
        ({"lora": LoRAConfig(targets=("q_prj",))}, "Did you mean 'q_proj'"),
        ({"lora": None, "from_adapter": Path("nowhere")}, "nowhere"),
        ({"from_adapter": Path("nowhere")}, "Cannot use rank with from_adapter='nowhere'"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(
    job: FinetuneJob, change: dict[str, Any], seen: str
) -> None:
    with pytest.raises(LoraError, match=seen):
        finetune(replace(job, **change))
    assert not list(job.run.out.iterdir())


ASKED_ONLY = [{"messages": [{"role": "user", "content": f"note {n}"}]} for n in range(9)]
LONG = [{"prompt": "word " * 200 + str(n), "completion": "end"} for n in range(9)]


@pytest.mark.parametrize(
    ("rows", "seen"),
    [
        (ASKED_ONLY, "they have no answers"),
        (LONG, "were truncated before their answers"),
    ],
)
def test_nothing_to_learn_is_known_before_the_weights_are_loaded(
    job: FinetuneJob, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], seen: str
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("lora.finetune.model.load_language_model", never)
    with pytest.raises(DataError, match=seen):
        finetune(replace(job, data=rows))
    assert not job.run.out.exists() or not list(job.run.out.iterdir())


def test_the_data_are_reported_before_the_weights_are_loaded(
    job: FinetuneJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loading(Exception):
        pass

    def refuse(*_: object, **__: object) -> None:
        raise Loading

    monkeypatch.setattr("lora.finetune.model.load_language_model", refuse)
    orders = make_orders("train", 24)
    job = replace(job, data=[*orders, *orders[:3]])
    reports: list[DataReport] = []
    with pytest.raises(Loading):
        finetune(job, show_data=reports.append)
    assert reports[0].n_examples > 20
    assert reports[0].warnings
    heard = Heard()
    with pytest.raises(Loading):
        finetune(job, heard)
    assert f"note: {reports[0].warnings[0]}" in heard.said


def test_the_run_keeps_what_was_likely_not_meant(job: FinetuneJob) -> None:
    orders = make_orders("train", 24)
    short = replace(job.train, steps=1)
    done = finetune(replace(job, data=[*orders, *orders[:3]], train=short))
    told = read_json(done.folder / "run.json")["data"]["warnings"]
    assert any("are copies of earlier ones" in warning for warning in told)


def test_a_transformers_model_goes_through_the_same_trainer(
    job: FinetuneJob, tiny_folder: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    model = as_language_model(apply_lora(model, LoRAConfig(rank=4, init_seed=0)))
    config = DataConfig(max_length=128)
    data = prepare_data(make_orders("train", 24), load_tokenizer(tiny_folder), config, 0)
    held_out = data.validation
    assert held_out is not None
    train_config = TrainConfig(steps=8, batch_size=4, learning_rate=2e-2)
    with create_run(tmp_path, "run") as run:
        result = train(
            TrainingJob(
                model=model,
                steps=choose_steps(model, choose_device("cpu"), train_config),
                stream=BatchStream(data.train, 4, 0),
                eval_batches=lambda: ordered_batches(held_out, 4),
                train_config=train_config,
                run_config=RunConfig(),
                run=run,
                choice=choose_device("cpu"),
            )
        )
        first = next(row.eval_loss for row in run.read_metrics() if row.eval_loss is not None)
    assert result.eval_loss < first - 0.1


@PEFTS_OWN
def test_the_step_is_pefts_step(tiny_folder: Path) -> None:
    """Gradients of one step on the same batch, B random, agree with PEFT's within 1e-5."""
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    settings = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
    theirs = peft.get_peft_model(base, settings)
    ours = apply_lora(load_decoder(tiny_folder), LoRAConfig(rank=4))
    generator = torch.Generator().manual_seed(3)
    pairs = {}
    for name, layer in theirs.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            mine = ours.get_submodule(name)
            for key, theirs_weight in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
                parameter = theirs_weight["default"].weight
                drawn = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.data.copy_(drawn)
                mine.get_parameter(key).data.copy_(drawn)
                pairs[f"{name}.{key}"] = parameter, mine.get_parameter(key)
    assert len(pairs) == 2 * 14
    theirs(input_ids=TOKENS, labels=TOKENS).loss.backward()
    flat = ours(TOKENS)[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(flat, TOKENS[:, 1:].flatten()).backward()
    for name, (a, b) in pairs.items():
        assert (a.grad - b.grad).norm() / a.grad.norm() <= 1e-5, name


def test_run_json_is_json_a_person_can_read(job: FinetuneJob) -> None:
    done = finetune(replace(job, train=replace(job.train, steps=1)))
    text = (done.folder / "run.json").read_text(encoding="utf-8")
    assert json.loads(text)["data"]["source"] == "rows given in Python"


def test_tensorboard_gets_the_metrics(job: FinetuneJob) -> None:
    pytest.importorskip("tensorboard")
    run = replace(job.run, tensorboard=True)
    done = finetune(replace(job, run=run, train=replace(job.train, steps=2)))
    (events,) = (done.folder / "tensorboard").iterdir()
    data = events.read_bytes()
    assert b"eval_loss" in data
    assert b"learning_rate" in data


def test_without_validation_data_the_validation_loss_is_null(
    tiny_folder: Path, orders_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"finetune --data {orders_file} --model {tiny_folder} --out {tmp_path} --name run"
    words += " --steps 2 --batch-size 2 --eval-fraction 0 --device cpu --no-report"
    assert main(words.split()) == 0
    assert "no finite validation loss after 2 steps" in capsys.readouterr().out
    assert main([*words.split(), "--resume", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert printed["eval_loss"] is None
    for file in (tmp_path / "run").rglob("*.json"):
        json.loads(file.read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_lora_flags_beside_an_adapter_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"finetune --data x.jsonl --out {tmp_path} --from-adapter somewhere --rank 8"
    assert main(words.split()) == 2
    assert "--from-adapter with LoRA flags such as --rank" in capsys.readouterr().err


def test_an_unknown_architecture_is_refused_before_the_data_are_read(
    tiny_folder: Path, tmp_path: Path, job: FinetuneJob
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(ModelError, match="mamba"):
        finetune(replace(job, model=str(folder), data="nowhere.jsonl"))


def test_what_is_said_of_lora_is_said_once(
    job: FinetuneJob, caplog: pytest.LogCaptureFixture
) -> None:
    finetune(replace(job, lora=LoRAConfig(rank=99), train=replace(job.train, steps=1)))
    assert caplog.text.count("the rank is above the smaller side") == 1


def test_a_resume_knows_the_adapter_it_began_with_by_its_content(
    job: FinetuneJob, tmp_path: Path
) -> None:
    first = finetune(job)
    train = replace(job.train, steps=4)
    more = replace(
        job, lora=None, from_adapter=first.saved, train=train, run=replace(job.run, name="more")
    )
    finetune(more)
    moved = first.saved.rename(tmp_path / "moved")
    resumed = replace(more, from_adapter=moved, resume=True)
    assert finetune(resumed).result.steps == 4
    config = read_json(moved / "adapter_config.json")
    (moved / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1600}))
    with pytest.raises(CheckpointError, match=r"from_adapter_fingerprint: \w+ then, \w+ now"):
        finetune(resumed)
