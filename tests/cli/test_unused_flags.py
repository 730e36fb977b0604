"""A flag that its command has no use for is refused by name, not ignored."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lora import cli
from lora.cli.flags.yaml_file import read_settings


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("export model.gguf --vllm --adapter .", "Cannot combine --vllm with a file to write:"),
        ("export --vllm --dtype q8_0 --overwrite --json", "with --dtype, --overwrite, --json:"),
        ("checkpoint runs/x@500 --overwrite", "Cannot use --overwrite without --out"),
        ("eval x.jsonl --no-base", "Cannot use --no-base without --adapter"),
        ("generate hi --model nowhere --top-p 0.9", "--top-p have no effect at --temperature 0"),
        ("init --raw --system be-brief", "system='be-brief': it needs turns"),
        ("data x.jsonl --eval-fraction 0.1", "--eval-fraction"),
        ("data x.jsonl --max-eval-examples 5", "--max-eval-examples"),
        ("compare x.jsonl --rate-steps 5", "rate_steps without rates"),
        ("compare x.jsonl --answers 5", "answers without metric"),
        ("compare x.jsonl --answer-tokens 5", "answer_tokens without metric"),
    ],
)
def test_a_flag_without_use_is_refused(
    words: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert cli.main(words.split()) == 2
    assert said in capsys.readouterr().err


def test_a_flag_without_effect_is_told_by_the_processes_alone_that_are_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "launch", lambda processes, words: 0)
    words = "generate hi --top-p 0.9 --device cpu --devices 2"
    assert cli.main(words.split()) == 0
    assert "no effect" not in capsys.readouterr().err


def test_init_asks_for_no_rank_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["orders.jsonl", "", "y", "4", "orders"])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    file = tmp_path / "run.yaml"
    assert cli.main(["init", str(file)]) == 0
    found = {"data": "orders.jsonl", "full": "true", "epochs": "4.0", "name": "orders"}
    assert read_settings(file) == found
