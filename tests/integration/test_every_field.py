"""Every field of the settings of LoRA, training and the base, by flags: in a run, and in a plan."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lora.cli import main
from lora.config import BaseWeights, LoRAConfig, TrainConfig

Case = tuple[str, Any]
"""The words of the command line, and the value that the run records."""

CASES: dict[str, list[Case]] = {
    "rank": [("--rank 3", 3)],
    "alpha": [("--alpha 5", 5.0)],
    "dropout": [("--dropout 0.25", 0.25)],
    "targets": [
        ("--targets q_proj,down_proj", ["q_proj", "down_proj"]),
        (r"--targets .*\.(k|v)_proj", r".*\.(k|v)_proj"),
    ],
    "exclude": [("--exclude gate_proj", ["gate_proj"])],
    "modules_to_save": [
        ("--modules-to-save embed_tokens", ["embed_tokens"]),
        ("--modules-to-save lm_head", ["lm_head"]),
        ("--modules-to-save norm,input_layernorm", ["norm", "input_layernorm"]),
    ],
    "rslora": [("--rslora", True)],
    "rank_pattern": [("--rank-pattern.q_proj 2", {"q_proj": 2})],
    "alpha_pattern": [("--alpha-pattern.q_proj 4", {"q_proj": 4.0})],
    "layers": [("--layers 1", [1])],
    "init_seed": [("--init-seed 7", 7)],
    "steps": [("--steps 2", 2)],
    "epochs": [("--epochs 0.05", None)],  # recorded as the steps that they take
    "batch_size": [("--batch-size 3", 3)],
    "gradient_accumulation": [("--gradient-accumulation 2", 2)],
    "learning_rate": [("--learning-rate 0.002", 0.002)],
    "whole_rate_fraction": [("--whole-rate-fraction 0.5 --modules-to-save norm", 0.5)],
    "schedule": [("--schedule linear", "linear"), ("--schedule constant", "constant")],
    "warmup_fraction": [("--warmup-fraction 0.5", 0.5)],
    "min_rate_fraction": [("--min-rate-fraction 0", 0.0)],
    "weight_decay": [("--weight-decay 0.1", 0.1)],
    "max_grad_norm": [("--max-grad-norm 0", 0.0)],
    "seed": [("--seed 3", 3)],
    "precision": [("--precision fp32", "fp32")],
    "base_dtype": [(f"--base-dtype {kind}", kind) for kind in ("nf4", "fp8", "int8")],
    "nf4_block": [("--base-dtype nf4 --nf4-block 32", 32)],
    "nf4_double_quant": [("--base-dtype nf4 --no-nf4-double-quant", False)],
    "nf4_embeddings": [("--base-dtype nf4 --nf4-embeddings", True)],
}
TOGETHER = (
    "--rank 3 --alpha 5 --dropout 0.25 --exclude gate_proj --rslora --rank-pattern.q_proj 2 "
    "--alpha-pattern.q_proj 4 --layers 1 --init-seed 7 --batch-size 4 "
    "--gradient-accumulation 2 --base-dtype nf4 --nf4-block 32 --no-nf4-double-quant "
    "--nf4-embeddings"
)
"""For plans, of which each takes a second."""
NOT_PLANNED = {f.name for f in dataclasses.fields(TrainConfig)} - {
    "batch_size",
    "gradient_accumulation",
}
"""Fields that change no memory."""


def fields() -> dict[str, str]:
    """Return every field's name with the section of run.json that holds it."""
    sections = {"lora": LoRAConfig, "train": TrainConfig, "nf4": BaseWeights}
    return {f.name: name for name, kind in sections.items() for f in dataclasses.fields(kind)}


def cases() -> list[tuple[str, str, Any]]:
    return [(name, words, value) for name, own in CASES.items() for words, value in own]


def test_every_field_has_a_case() -> None:
    # A new field needs one: words of the command line, and what run.json then holds.
    assert CASES.keys() == fields().keys()


@pytest.mark.parametrize(("name", "words", "value"), cases(), ids=lambda each: str(each)[:24])
def test_a_run_uses_it(
    name: str,
    words: str,
    value: Any,
    tiny_folder: Path,
    orders_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["finetune", "--model", str(tiny_folder), "--data", str(orders_file)]
    given = words.split()
    for flag, default in (("--steps", "1"), ("--batch-size", "2")):
        is_given = flag in given or (flag == "--steps" and "--epochs" in given)
        given += [] if is_given else [flag, default]
    given += ["--max-length", "128", "--samples", "0", "--out", str(tmp_path), "--no-report"]
    assert main([*command, *given, "--json"]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    record = json.loads(Path(found["folder"], "run.json").read_text(encoding="utf-8"))
    section = record if name == "base_dtype" else record[fields()[name]]
    assert section[name] == value
    assert Path(found["saved"], "adapter_model.safetensors").is_file()


def test_a_plan_takes_it(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Little memory, or the search for the largest batch takes long.
    plan = ["plan", "--model", str(tiny_folder), "--memory-gb", "0.001", "--max-length", "64"]
    alone = ["--modules-to-save", "--targets"]
    planned = {f"--{name.replace('_', '-')}" for name in fields().keys() - NOT_PLANNED}
    words = TOGETHER.replace("--no-", "--").split()
    given = {word.partition(".")[0] for word in words if word.startswith("--")}
    assert planned == given | set(alone)
    words = [case for name in ("modules_to_save", "targets") for case, _ in CASES[name][:2]]
    trained = []
    for more in ("", TOGETHER, *words):
        assert main([*plan, *more.split(), "--json"]) == 0, more
        trained.append(json.loads(capsys.readouterr().out)["lora"]["trained_parameters"])
    assert len(set(trained)) >= 4, trained
