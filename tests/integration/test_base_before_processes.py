"""What a base cannot be is refused before any process is started, and nothing is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lora.adapters.apply import apply_lora
from lora.adapters.save_load import save_adapter
from lora.cli import main
from lora.config import BaseWeights, LoRAConfig
from lora.pretrained.hf_weights import load_decoder
from tests.finetune.tiny_models import save_tiny
from tests.pretrained.quantised.four_bit import write_4bit

REFUSED = {
    "finetune plain --full --base-dtype int8": "base_dtype='int8' with full fine-tuning",
    "finetune plain --nf4-block 128": "nf4_block=128 with base_dtype='auto'",
    "finetune plain --base-dtype nf4 --nf4-block 100": "nf4_block=100: must be one of 32, 64",
    "finetune odd --base-dtype nf4": "layers.0.mlp.down_proj in nf4: it has 21 inputs",
    "finetune packed --full": "it is in 4 bits already",
    "finetune packed --base-dtype fp8": "base_dtype='fp8' with",
    "finetune packed --base-dtype nf4 --nf4-block 128 --parallel fsdp": "nf4_block=128 with",
    "sweep odd --base-dtype nf4 --rank 2,4": "layers.0.mlp.down_proj in nf4: it has 21 inputs",
    "sweep packed --base-dtype int8 --rank 2,4": "it is in 4 bits already",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "plain", "llama")
    save_tiny(folder / "odd", "llama", intermediate_size=21)
    write_4bit(folder / "plain", folder / "packed")
    return folder


@pytest.mark.parametrize("words", REFUSED)
def test_it_is_named_before_processes_start(
    words: str,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("lora.cli.launch", lambda *_: pytest.fail("processes were started"))
    monkeypatch.chdir(tmp_path)
    command, model, *flags = words.split()
    data = ["--data", "not read.jsonl", "--devices", "2", "--device", "cpu"]
    assert main([command, *flags, *data, "--model", str(models / model)]) == 2
    assert REFUSED[words] in " ".join(capsys.readouterr().err.split())
    assert os.listdir(tmp_path) == []


def test_what_can_be_starts_them(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora.cli.launch", lambda *_: 7)
    monkeypatch.chdir(tmp_path)
    for flags in (["--parallel", "fsdp"], ["--base-dtype", "nf4"], []):
        given = ["--data", "x.jsonl", "--devices", "2", "--device", "cpu"]
        assert main(["finetune", *flags, *given, "--model", str(models / "packed")]) == 7


def test_the_base_of_an_adapter_to_continue_is_checked_too(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = load_decoder(models / "plain", base=BaseWeights("nf4", nf4_embeddings=True))
    apply_lora(model, LoRAConfig(rank=2))
    save_adapter(model, tmp_path / "q", base_name=str(models / "plain"))
    monkeypatch.setattr("lora.cli.launch", lambda *_: 7)
    given = ["--data", "x.jsonl", "--devices", "2", "--device", "cpu", "--parallel", "fsdp"]
    words = ["finetune", "--from-adapter", str(tmp_path / "q"), *given]
    assert main(words) == 2
    assert "nf4_embeddings with parallel='fsdp'" in " ".join(capsys.readouterr().err.split())
    assert main([*words, "--base-dtype", "original"]) == 7
