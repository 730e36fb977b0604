"""`lora plan --devices`: memory of one of several devices, and ddp or fsdp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora.cli import main


def plan(capsys: pytest.CaptureFixture[str], model: Path, *words: str) -> dict[str, Any]:
    sizes = ["--batch-size", "8", "--max-length", "256", "--json"]
    assert main(["plan", "--model", str(model), *sizes, *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture
def wide_folder(tmp_path: Path) -> Path:
    """A model with more weights than activations, without its weights."""
    values = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1024,
        "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


def test_the_plan_is_of_one_device(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpus = ["--device", "cuda", "--devices", "4", "--memory-gb", "0.001"]  # no search for a batch
    found = plan(capsys, tiny_folder, *gpus, "--parallel", "fsdp")
    assert (found["devices"], found["rows"]) == (4, 2)
    assert found["parallel"] == {"lora": "fsdp", "full": "fsdp"}
    assert found["parallel_reason"]["lora"] == "4 devices, fsdp: as asked"
    one = plan(capsys, tiny_folder, "--device", "cuda", "--memory-gb", "0.001")
    assert (one["devices"], one["parallel"]) == (1, {"lora": None, "full": None})
    assert found["full"]["optimizer"] == pytest.approx(one["full"]["optimizer"] / 4, rel=0.01)


@pytest.mark.slow
def test_devices_share_a_batch_and_take_fsdp_where_it_is_needed(
    wide_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus = ["--device", "cuda", "--devices", "4"]
    ddp = plan(capsys, wide_folder, *gpus, "--memory-gb", "4")
    assert (ddp["devices"], ddp["rows"]) == (4, 2)
    assert ddp["parallel"] == {"lora": "ddp", "full": "ddp"}
    room = 0.9 * ddp["full"]["total"] / 1e9
    tight = plan(capsys, wide_folder, *gpus, "--memory-gb", str(room))
    assert tight["parallel"] == {"lora": "ddp", "full": "fsdp"}
    assert tight["parallel_reason"]["full"].startswith("4 devices, fsdp: ")
    assert tight["full"]["total"] <= room * 1e9
    assert tight["largest_rows"]["full"] >= 2


def test_processes_on_a_cpu_are_named(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--device", "cpu", "--devices", "2", "--max-length", "64", "--memory-gb", "0.001"]
    assert main(["plan", "--model", str(tiny_folder), *words, "--parallel", "ddp"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "on cpu, each of 2 processes: 4 sequences of 64 tokens" in shown
    assert "LoRA: 2 devices, ddp: as asked; " in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--devices", "9"], "Cannot train with 9 processes: a micro-batch has 8 sequences"),
        (["--devices", "0"], "Cannot plan for --devices 0. Allowed: an integer ≥ 1"),
        (["--parallel", "fsdp"], "'fsdp' with one process"),
        (["--devices", "2", "--parallel", "dpp"], "ddp"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["plan", "--model", str(tiny_folder), "--device", "cpu", *words]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
