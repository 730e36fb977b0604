"""`lora init` writes a file that `lora finetune` takes, with every setting and its default."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from lora import cli
from lora.cli.flags.yaml_file import read_settings
from lora.config import BaseWeights, DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.finetune.job import FinetuneJob


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[FinetuneJob]:
    """The jobs that lora finetune would run."""
    seen: list[FinetuneJob] = []

    def run(job: FinetuneJob, *_: Any, **__: Any) -> None:
        seen.append(job)
        raise KeyboardInterrupt

    monkeypatch.setattr("lora.finetune.run.finetune", run)
    return seen


def test_all_defaults_are_there_and_are_those_of_finetune(
    tmp_path: Path, jobs: list[FinetuneJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    file = tmp_path / "run.yaml"
    assert cli.main(["init", str(file)]) == 0
    assert read_settings_text(file) == {}
    lines = file.read_text().splitlines()
    settings = [line[1:] for line in lines if line.startswith("#") and line[1:2].isalpha()]
    names = {line.partition(":")[0] for line in settings}
    known = set(cli._known_settings("finetune")) - {"json", "resume"}
    assert names == {name for name in known if not name.startswith("no_")}
    full = tmp_path / "full.yaml"
    full.write_text("\n".join(line for line in settings if not line.endswith(":")) + "\ndata: x\n")
    without_full = full.read_text().replace("full: false\n", "")
    full.write_text(without_full)
    assert cli.main(["finetune", str(full)]) == 130
    assert cli.main(["finetune", "x"]) == 130
    assert jobs[0] == jobs[1]


def read_settings_text(file: Path) -> dict[str, Any]:
    """Return the settings of a file that may hold nothing but comments."""
    text = file.read_text() + "\ndata: x\n"
    copy = file.with_name("copy.yaml")
    copy.write_text(text)
    settings = read_settings(copy)
    del settings["data"]
    return settings


def test_what_is_given_is_what_the_run_gets(tmp_path: Path, jobs: list[FinetuneJob]) -> None:
    file = tmp_path / "run.yaml"
    words = "--data x --lora-r 16 --targets q_proj,v_proj --rank-pattern q_proj=4,a.b=2 --lr 1e-3"
    words += " --no-packing --special-tokens <|a|> --deterministic --no-report --name #1 --steps 9"
    words += " --load-in-4bit --no-nf4-double-quant"
    assert cli.main(["init", str(file), *words.split()]) == 0
    assert cli.main(["finetune", str(file), "--steps", "10"]) == 130
    (job,) = jobs
    targets = ("q_proj", "v_proj")
    assert job.lora == LoRAConfig(16, targets=targets, rank_pattern={"q_proj": 4, "a.b": 2})
    assert job.train == TrainConfig(steps=10, learning_rate=1e-3)
    assert job.base_weights == BaseWeights("nf4", nf4_double_quant=False)
    assert job.data_config == DataConfig(packing=False, special_tokens=("<|a|>",))
    assert (job.run, job.deterministic) == (RunConfig(name="#1"), True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--rank 0", "rank=0"),
        ("--full --rank 8", "Cannot combine full, rank"),
        ("--full --base-dtype nf4", "base_dtype='nf4' with full fine-tuning"),
        ("--nf4-block 32", "nf4_block=32 with base_dtype='auto'"),
        ("--steps 5 --micro-batch-size 3", "effective batch size"),
    ],
)
def test_what_finetune_would_refuse_is_refused_now(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    file = tmp_path / "run.yaml"
    assert cli.main(["init", str(file), *words.split()]) == 2
    assert said in capsys.readouterr().err
    assert not file.exists()


def test_a_file_is_not_replaced_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rank: 3\n")
    assert cli.main(["init", str(file), "--data", "x"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert file.read_text() == "rank: 3\n"
    assert cli.main(["init", str(file), "--data", "x", "--overwrite"]) == 0
    assert read_settings(file) == {"data": "x"}


def test_on_a_terminal_it_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["orders.jsonl", "", "maybe", "n", "many", "0", "4", "", "orders"])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    file = tmp_path / "run.yaml"
    assert cli.main(["init", str(file)]) == 0
    assert read_settings(file) == {"data": "orders.jsonl", "rank": "4", "name": "orders"}
