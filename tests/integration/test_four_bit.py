"""Whole runs and commands on a folder that bitsandbytes has quantised to 4 bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora.adapters.apply import apply_lora
from lora.cli import main
from lora.config import BaseWeights, DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.decoder.quantised.base import quantised_modules
from lora.errors import ConfigError, LoraError
from lora.fast.memory.plan import PlanInputs
from lora.fast.memory.planner import plan_memory
from lora.finetune import FinetuneJob, finetune
from lora.pretrained.hf_weights import load_decoder, save_decoder
from lora.pretrained.load.models import model_config
from lora.pretrained.load.task import planned_base
from lora.runs.disk import read_json, read_rows
from tests.pretrained.quantised.four_bit import write_4bit


@pytest.fixture(scope="module")
def four(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in 4 bits, but for the second block's feed-forward."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bnb-4bit"
    write_4bit(tiny_folder, folder, skipped=lambda name: "layers.1.mlp" in name)
    return folder


@pytest.fixture
def job(four: Path, tmp_path: Path) -> FinetuneJob:
    return FinetuneJob(
        data=make_orders("train", 24),
        model=str(four),
        lora=LoRAConfig(rank=4),
        train=TrainConfig(steps=6, batch_size=4, learning_rate=2e-2, schedule="constant"),
        data_config=DataConfig(max_length=128),
        run=RunConfig(out=tmp_path, name="run", eval_every_steps=3, save_every_steps=3),
    )


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl") if "loss" in row]


def test_it_trains_as_over_the_same_values_unpacked(
    job: FinetuneJob, four: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    done = finetune(job)
    record = read_json(done.folder / "run.json")
    assert (record["base_dtype"], record["nf4"]["nf4_block"]) == ("nf4", 64)
    twin = load_decoder(tiny_folder)
    for name, layer in quantised_modules(load_decoder(four)).items():
        twin.get_submodule(name).weight = torch.nn.Parameter(layer.unpacked())
    for path in tiny_folder.iterdir():
        (tmp_path / "plain").mkdir(exist_ok=True)
        (tmp_path / "plain" / path.name).write_bytes(path.read_bytes())
    save_decoder(twin, tmp_path / "plain")
    other = replace(job, model=str(tmp_path / "plain"), run=replace(job.run, name="plain"))
    assert losses(done.folder) == pytest.approx(losses(finetune(other).folder), rel=1e-4)


def test_a_resumed_run_ends_with_the_same_bytes(job: FinetuneJob, tmp_path: Path) -> None:
    whole = finetune(replace(job, run=replace(job.run, out=tmp_path / "whole")))
    finetune(replace(job, train=replace(job.train, steps=3)))
    resumed = finetune(replace(job, resume=True))
    one, other = (d.saved / "adapter_model.safetensors" for d in (whole, resumed))
    assert one.read_bytes() == other.read_bytes()
    assert {str(t.dtype) for t in load_file(one).values()} == {"torch.float32"}


def test_a_check_for_vllm_warns_only_of_another_base(
    job: FinetuneJob, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["export", "--vllm", "--adapter", str(finetune(job).saved)]
    capsys.readouterr()
    assert main(flags) == 0
    assert "own weights" not in capsys.readouterr().err
    assert main([*flags, "--model", str(tiny_folder)]) == 0
    assert "own weights" in capsys.readouterr().err


def test_what_it_cannot_be_is_refused_before_it_is_read(job: FinetuneJob) -> None:
    full = replace(job, lora=None)
    with pytest.raises(ConfigError, match=r"all weights of .*in 4 bits already.*Train with LoRA"):
        finetune(full)
    with pytest.raises(ConfigError, match=r"base_dtype='fp8' with .*base_dtype=auto"):
        finetune(replace(job, base_dtype="fp8"))
    with pytest.raises(ConfigError, match=r"base_dtype='original' with .*there are no others"):
        finetune(replace(job, base_dtype="original"))
    with pytest.raises(ConfigError, match=r"nf4_block=128 with .*nf4_block=64"):
        finetune(replace(job, base_dtype="nf4", nf4_block=128))
    assert not job.directory.exists()


def test_a_plan_over_another_kind_of_base_is_refused(
    four: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", str(four), "--base-dtype", "fp8"]) == 2
    assert "in 4 bits already" in capsys.readouterr().err


def test_a_plan_says_that_full_fine_tuning_is_not_of_the_4_bit_folder(
    four: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # No search for the largest batch in so little memory.
    assert main(["plan", "--model", str(four), "--device", "cpu", "--memory-gb", "0.01"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "full fine-tuning: of the unquantised model; it cannot train nf4." in shown


def test_a_plan_counts_what_the_folder_leaves_plain(four: Path) -> None:
    base, packed = planned_base(four, BaseWeights())
    assert base.base_dtype == "nf4"
    inputs = PlanInputs(
        model_config(four), LoRAConfig(rank=4), 2, 32, "cpu", torch.float32,
        base=base, quantised_weights=packed,
    )  # fmt: skip
    model = load_decoder(four)
    apply_lora(model, LoRAConfig(rank=4))
    tensors = [*model.parameters(), *model.buffers()]
    held = sum(t.numel() * t.element_size() for t in tensors)
    assert plan_memory(inputs).weights == pytest.approx(held, rel=0.02)
    assert plan_memory(replace(inputs, quantised_weights=None)).weights < 0.9 * held


def test_another_method_is_refused_in_every_command(
    four: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gptq"
    folder.mkdir()
    for path in four.iterdir():
        text = path.read_bytes()
        if path.name == "config.json":
            text = text.replace(b"bitsandbytes", b"gptq")
        (folder / path.name).write_bytes(text)
    data = str(tmp_path / "data.jsonl")
    Path(data).write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    model = ["--model", str(folder)]
    for command in (
        ["finetune", data, *model, "--out", str(tmp_path)],
        ["sweep", data, *model, "--out", str(tmp_path), "--rank", "2,4"],
        ["plan", *model],
        ["generate", "a", *model],
        ["eval", data, *model],
        ["export", "--out", str(tmp_path / "x.gguf"), *model],
    ):
        assert main(command) == 2, command
        assert "quantised by GPTQ" in capsys.readouterr().err, command


def test_a_base_in_another_state_is_refused_when_resumed(
    job: FinetuneJob, tiny_folder: Path
) -> None:
    finetune(job)
    other = replace(job, model=str(tiny_folder), resume=True)
    with pytest.raises(LoraError, match=r"base_dtype|model"):
        finetune(replace(other, train=replace(job.train, steps=8)))
