"""`--resume --name x` takes the settings of the run that it resumes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lora import cli
from lora.cli import build_app
from lora.cli.flags.from_fields import config_from
from lora.cli.flags.resumed import settings_to_resume
from lora.config import BaseWeights, DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.errors import CheckpointError, RunNotFoundError
from lora.runs.record import SCHEMA_VERSION
from lora.sweep.grid import Grid

LORA = LoRAConfig(rank=4, alpha=2.5, targets=("q_proj", "v_proj"), rank_pattern={"q_proj": 2})
TRAIN = TrainConfig(steps=7, learning_rate=0.0123456789, schedule="linear")
DATA = DataConfig(max_length=64, packing=False, special_tokens=("<a>", "<b>"))


@pytest.fixture
def given(tmp_path: Path) -> dict[str, str]:
    """What resumes the run."""
    return {"resume": "true", "name": "run", "out": str(tmp_path)}


def write(folder: Path, kind: str, **values: Any) -> None:
    """Write the record of a run."""
    (folder / "run").mkdir()
    record = {"schema_version": SCHEMA_VERSION, "kind": kind, "data": {"source": "a b.jsonl"}}
    text = json.dumps({**record, **values}, default=str)
    (folder / "run" / "run.json").write_text(text)


def bound(command: str, given: dict[str, str]) -> dict[str, Any]:
    """Return a command's arguments from the record alone."""
    app = build_app(command, [settings_to_resume(command, given)])
    return app.parse_args([command], exit_on_error=False, print_error=False)[1].arguments


def test_a_finetune_has_all_settings_that_it_had(tmp_path: Path, given: dict[str, str]) -> None:
    run = asdict(RunConfig(out=tmp_path, name="run", patience=3, fast=False))
    values = {"lora": asdict(LORA), "train": asdict(TRAIN), "data_config": asdict(DATA), "run": run}
    base = BaseWeights("nf4", nf4_block=128, nf4_double_quant=False)
    values |= {"base_dtype": "nf4", "nf4": base.nf4_settings}
    write(tmp_path, "finetune", **values, deterministic=True, model_source="m",
          implementation="native")  # fmt: skip
    found = bound("finetune", given)
    assert (found["data"], found["model"]) == (Path("a b.jsonl"), "m")
    assert found["deterministic"] is True
    assert config_from(BaseWeights, found["base"]) == base
    assert found["implementation"] == "native"
    assert config_from(LoRAConfig, found["lora"]) == LORA
    assert config_from(TrainConfig, found["train"]) == TRAIN
    assert config_from(DataConfig, found["data_config"]) == DATA
    assert (found["run"].patience, found["run"].fast) == (3, False)
    assert "steps" not in settings_to_resume("finetune", {**given, "steps": "9"})[0]


def test_settings_of_nf4_are_not_held_against_another_base_dtype(
    tmp_path: Path, given: dict[str, str]
) -> None:
    base = BaseWeights("nf4", nf4_block=128)
    write(tmp_path, "finetune", base_dtype="nf4", nf4=base.nf4_settings,
          lora=asdict(LORA), train=asdict(TRAIN))  # fmt: skip
    assert settings_to_resume("finetune", given)[0]["nf4-block"] == "128"
    again = settings_to_resume("finetune", {**given, "base_dtype": "nf4"})[0]
    assert again["nf4-block"] == "128"
    other = settings_to_resume("finetune", {**given, "base_dtype": "int8"})[0]
    assert not [name for name in other if name.startswith("nf4")]


def test_a_resume_without_a_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("finetune", "sweep", "compare"):
        assert cli.main([command, "--resume"]) == 2
        assert "no run is named. Name it with --name" in capsys.readouterr().err


def test_a_sweep_has_its_grid_and_full_fine_tuning(tmp_path: Path, given: dict[str, str]) -> None:
    grid = Grid(rank=(4, 8), learning_rate=(3e-4, 0.0123456789), alpha=("2r",))
    write(
        tmp_path,
        "sweep",
        sweep={"grid": asdict(grid), "halving": True, "steps": 9},
        lora=asdict(LoRAConfig(rslora=True)),
        train=asdict(TrainConfig(steps=9)),
        run=asdict(RunConfig(fast=False)),
    )
    (tmp_path / "run" / "full").mkdir()
    record = {"schema_version": SCHEMA_VERSION, "kind": "finetune", "learning_rate": 2e-5}
    (tmp_path / "run" / "full" / "run.json").write_text(json.dumps(record))
    found = bound("sweep", given)
    assert config_from(Grid, found["grid"]) == grid
    assert (found["full"], found["full_learning_rate"], found["halving"]) == (True, 2e-5, True)
    assert (found["lora"].rslora, found["train"].steps, found["run"].fast) == (True, 9, False)


def test_a_comparison_has_its_methods(tmp_path: Path, given: dict[str, str]) -> None:
    compare = {"data": "a b.jsonl", "methods": ["lora", "full", "peft"], "train": asdict(TRAIN)}
    write(tmp_path, "compare", compare={**compare, "same": "time"})
    found = bound("compare", given)
    assert (found["peft"], found["same"], found["train"].steps) == (True, "time", 7)


def test_other_commands_and_runs_are_told(tmp_path: Path, given: dict[str, str]) -> None:
    with pytest.raises(RunNotFoundError, match="Cannot resume the run"):
        settings_to_resume("finetune", given)
    write(tmp_path, "sweep")
    with pytest.raises(CheckpointError, match="Use lora sweep --resume"):
        settings_to_resume("finetune", given)
    assert settings_to_resume("finetune", {**given, "resume": "false"}) == ({}, "")
    assert settings_to_resume("finetune", {"name": "run"}) == ({}, "")
    assert settings_to_resume("generate", given) == ({}, "")


def test_the_command_line_says_what_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["finetune", "--out", str(tmp_path), "--resume"]
    assert cli.main([*words, "--name", "gone"]) == 2
    assert "Cannot resume the run" in capsys.readouterr().err


def test_every_setting_of_the_run_that_a_command_has_comes_back(
    tmp_path: Path, given: dict[str, str]
) -> None:
    values = {
        "eval_every_steps": 7,
        "save_every_steps": 3,
        "save": "last",
        "samples": 5,
        "sample_tokens": 9,
        "device": "cpu",
        "fast": False,
    }
    grid = {"grid": asdict(Grid(rank=(2, 4))), "halving": False, "steps": 4}
    kinds = {"sweep": {"sweep": grid}, "compare": {"compare": {"data": "a b.jsonl"}}}
    for kind, of_kind in kinds.items():
        out = tmp_path / kind
        out.mkdir()
        run = {**asdict(RunConfig(out=out, name="run")), **values}
        write(out, kind, **of_kind, run=run)
        found = vars(bound(kind, {**given, "out": str(out)})["run"])
        flags = found.keys() - {"out", "name"}
        assert flags <= values.keys()
        assert {name: found[name] for name in flags} == {name: values[name] for name in flags}
