"""Values that conversion would change are refused, from every source."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora import cli
from lora.cli import build_app


@pytest.mark.parametrize(
    ("command", "words", "seen"),
    [
        ("finetune --data x", "--steps 2.9", "--steps='2.9': must be a whole number"),
        ("finetune --data x", "--rank 4.6", "--rank='4.6': must be a whole number"),
        ("finetune --data x", "--seed 1.5", "--seed='1.5': must be a whole number"),
        ("finetune --data x", "--rank 1.0e400", "--rank='1.0e400': must be a whole number"),
        ("finetune --data x", "--layers 1.5", "'1.5': must be a whole number"),
        ("finetune --data x", '--rank-pattern {"q":4.6}', "must be a whole number"),
        ("finetune --data x", '--rank-pattern {"q":1e400}', "unable to convert"),
        ("finetune --data x", '--rank-pattern {"q":4,"q":5}', "'q' is given twice"),
        ("finetune --data x", "--rank-pattern.q 4.6", "--rank-pattern[q]='4.6'"),
        ("sweep --data x", "--rank 4.6", "--rank='4.6': must be a whole number"),
        ("sweep --data x", "--rank 4.6,8", "rank='4.6': must be an int"),
        ("eval x", "--answers 2.5", "--answers='2.5': must be a whole number"),
        ("generate x", "--top-k 2.5", "--top-k='2.5': must be a whole number"),
        ("finetune", "--data ~nobody-here/x", "the home directory that ~ means is not known"),
        ("finetune --data x", "--steps 1000000000000000000000000000000", "steps=1000"),
        ("finetune --data x", "--batch-size 1000000000000", "batch_size=1000000000000"),
        ("finetune --data x", "--alpha 1e308", "alpha=1e+308"),
        ("finetune --data x", "--alpha-pattern.q 1e308", "alpha_pattern['q']=1e+308"),
        ("finetune --data x", "--learning-rate 1e308", "learning_rate=1e+308"),
        ("generate x", "--top-p 1e-320", "top_p=1e-320"),
        ("generate x", "--temperature 1e-320", "temperature=1e-320"),
        ("generate x", "--top-k 1000000000000000000000", "top_k=1000"),
        ("generate x", "--max-new-tokens 1000000000000", "max_new_tokens=1000"),
    ],
)
def test_it_is_refused_in_words(
    command: str, words: str, seen: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command.split(), *words.split()]) == 2
    err = capsys.readouterr().err
    assert seen in err
    assert "Traceback" not in err


def test_a_null_character_in_a_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text('data: "a\\0b"\n')
    assert cli.main(["finetune", "--config", str(file)]) == 2
    assert "has a null character" in capsys.readouterr().err


def test_what_means_the_same_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = {"data": "~/x", "report": "off", "rank": "4.0"}
    app = build_app(settings, "settings.yaml", "finetune")
    _, bound, _ = app.parse_args(["finetune"], exit_on_error=False, print_error=False)
    assert bound.arguments["data"] == tmp_path / "x"
    assert bound.arguments["report"] is False
    assert bound.arguments["lora"].rank == 4
