from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lora.cli import build_app
from lora.cli.flags.from_fields import config_from
from lora.compare.config import LearningRates
from lora.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.report.records.command import comparison_command, finetune_command, sweep_command
from lora.runs.read_record import read_run_record
from lora.runs.record import DataRecord, RunRecord
from lora.sweep.grid import Grid

DATA = {"source": "my orders.jsonl", "eval_source": "held out.jsonl"}

CONFIGS: dict[str, type] = {
    "lora": LoRAConfig, "train": TrainConfig, "data_config": DataConfig, "run": RunConfig,
    "grid": Grid, "rates": LearningRates,
}  # fmt: skip


def parsed(command: str) -> dict[str, Any]:
    """Return what the command line makes of a command, by parameter; flags as their configs."""
    program, *words = shlex.split(command)
    assert program == "lora"
    _, bound, _ = build_app().parse_args(words, exit_on_error=False, print_error=False)
    return {
        name: config_from(CONFIGS[name], value) if name in CONFIGS else value
        for name, value in bound.arguments.items()
    }


def record(folder: Path, values: dict[str, Any]) -> RunRecord:
    """Return the record that is read from a run.json of these values."""
    (folder / "run.json").write_text(json.dumps(values, default=str))
    return read_run_record(folder)


@pytest.mark.parametrize(
    ("lora", "train", "data_config"),
    [
        (LoRAConfig(), TrainConfig(), DataConfig()),
        (
            LoRAConfig(rank=4, alpha=2.5, targets=("q_proj", "v_proj"), rslora=True,
                       exclude=("down_proj",), rank_pattern={"q_proj": 2}, layers=(0, 1)),
            TrainConfig(steps=7, learning_rate=3e-4, schedule="linear", seed=3),
            DataConfig(max_length=64, packing=False, long_examples="drop",
                       chat_template=Path("own.jinja"), special_tokens=("<a>", "<b>")),
        ),
        (None, TrainConfig(weight_decay=0.1), DataConfig(eval_fraction=0.2)),
    ],
)  # fmt: skip
def test_the_command_of_a_finetune_asks_for_the_same(
    lora: LoRAConfig | None, train: TrainConfig, data_config: DataConfig, tmp_path: Path
) -> None:
    run = RunConfig(out=Path("my runs"), name="b", samples=0, fast=False)
    asked = {"model": "m", "model_source": "models/m", "data": DATA, "deterministic": True}
    asked |= {"lora": None if lora is None else asdict(lora), "train": asdict(train)}
    asked |= {"data_config": asdict(data_config), "run": asdict(run)}
    command = finetune_command(record(tmp_path, asked), "b")
    assert command is not None
    found = parsed(command)
    assert found["data"] == Path("my orders.jsonl")
    assert found["eval_data"] == Path("held out.jsonl")
    assert found["model"] == "models/m"
    assert found["deterministic"] is True
    assert found.get("full", False) is (lora is None)
    if lora is not None:
        assert (found.get("lora") or LoRAConfig()) == lora
    assert (found.get("train") or TrainConfig()) == train
    assert (found.get("data_config") or DataConfig()) == data_config
    assert found["run"] == run
    together = finetune_command(record(tmp_path, {**asked, "world_size": 4}), "b")
    assert parsed(str(together)) == {**found, "devices": 4}


def test_the_command_of_a_continued_adapter_names_a_base_that_was_not_quantised(
    tmp_path: Path,
) -> None:
    asked = {"from_adapter": "runs/q", "train": asdict(TrainConfig()), "data": DATA}
    assert "--base-dtype original" in str(finetune_command(record(tmp_path, asked), "b"))
    (tmp_path / "over").mkdir()
    over = record(tmp_path / "over", {**asked, "base_dtype": "nf4", "nf4": {"nf4_block": 32}})
    assert "--base-dtype nf4 --nf4-block 32" in str(finetune_command(over, "b"))


def test_the_command_of_a_sweep_asks_for_the_same(tmp_path: Path) -> None:
    grid = Grid(rank=(4, 8), learning_rate=(3e-4, 1e-3), alpha=("2r",), seed=(0, 1))
    lora, train = asdict(LoRAConfig(rslora=True)), asdict(TrainConfig(steps=9))
    asked = {"data": DATA, "sweep": {"grid": asdict(grid), "halving": True, "steps": 9}}
    asked |= {"lora": lora, "train": train, "data_config": asdict(DataConfig(max_length=99))}
    asked |= {"run": asdict(RunConfig(name="s", eval_every_steps=3)), "deterministic": True}
    command = sweep_command(record(tmp_path, asked), "s", 2e-5)
    assert command is not None
    found = parsed(command)
    assert (found["full"], found["full_learning_rate"]) == (True, 2e-5)
    assert "--full-learning-rate" not in (sweep_command(record(tmp_path, asked), "s", 1e-4) or "")
    assert found["grid"] == grid
    assert (found["halving"], found["deterministic"]) == (True, True)
    assert found["lora"].rslora is True
    assert found["train"].steps == 9
    assert found["data_config"] == DataConfig(max_length=99)
    assert (found["run"].name, found["run"].eval_every_steps) == ("s", 3)


def test_the_command_of_a_comparison_names_what_was_asked(tmp_path: Path) -> None:
    compare = {
        "data": "orders.jsonl", "model": None, "eval_data": "held.jsonl", "same": "time",
        "methods": ["lora", "full", "peft"], "lora": asdict(LoRAConfig(rank=4)),
        "train": asdict(TrainConfig(steps=50)), "data_config": asdict(DataConfig()),
        "rates": {"rates": [3e-4, 1e-3], "full_rates": [], "full_learning_rate": None,
                  "rate_steps": 20},
        "measures": {"forgetting_data": None, "metric": "exact-match", "test_data": None,
                     "answers": 40, "answer_tokens": 64},
    }  # fmt: skip
    run = asdict(RunConfig(name="fair", samples=3))
    asked = {"kind": "compare", "compare": compare, "run": run}
    command = comparison_command(record(tmp_path, asked), "fair")
    assert command == (
        "lora compare --data orders.jsonl --eval-data held.jsonl --same time --peft "
        "--rates 3e-4,1e-3 --rate-steps 20 --metric exact-match --answers 40 --answer-tokens 64 "
        "--rank 4 --steps 50 --name fair --samples 3"
    )
    found = parsed(command)
    assert found["rates"] == LearningRates(rates=(3e-4, 1e-3), rate_steps=20)
    assert (found["same"], found["peft"], found["run"].samples) == ("time", True, 3)
    assert found["measures"].metric == "exact-match"
    on_two = comparison_command(record(tmp_path, {**asked, "world_size": 2}), "fair")
    assert on_two == f"{command} --devices 2"


@pytest.mark.parametrize("data", [{"source": "rows given in Python"}, {"in_memory": True}])
def test_what_was_started_from_python_has_no_command(data: dict[str, Any], tmp_path: Path) -> None:
    asked = record(tmp_path, {"data": data, "train": {}, "lora": {}})
    assert finetune_command(asked, "x") is None
    settings = {"grid": {}, "halving": False, "steps": 1}
    assert sweep_command(record(tmp_path, {"data": data, "sweep": settings}), "x") is None
    asked = record(tmp_path, {"kind": "compare", "compare": {"data": "3 rows given in Python"}})
    assert comparison_command(asked, "x") is None
    asked = RunRecord(kind="compare", compare={"data": "3 rows"}, data=DataRecord(in_memory=True))
    assert comparison_command(asked, "x") is None
    assert finetune_command(record(tmp_path, {"settings": {}, "data": "prose"}), "x") is None


def test_names_that_begin_with_a_dash_are_no_flags(tmp_path: Path) -> None:
    values = {
        "schema_version": 1,
        "kind": "finetune",
        "method": "lora",
        "model_source": "--model",
        "lora": asdict(LoRAConfig()),
        "train": asdict(TrainConfig()),
        "data": {"source": "-data.jsonl"},
    }
    command = finetune_command(record(tmp_path, values), "--name")
    assert command is not None
    found = parsed(command)
    assert str(found["data"]) == "-data.jsonl"
    assert found["model"] == "--model"
    assert found["run"].name == "--name"
