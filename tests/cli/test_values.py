"""Values that conversion would change are refused, from every source."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora import cli
from lora.cli import build_app
from lora.cli.flags.values import name_pairs


@pytest.mark.parametrize(
    ("command", "words", "seen"),
    [
        ("finetune --data x", "--steps 2.9", "--steps='2.9': must be a whole number"),
        ("finetune --data x", "--rank 4.6", "--rank='4.6': must be a whole number"),
        ("finetune --data x", "--seed 1.5", "--seed='1.5': must be a whole number"),
        ("finetune --data x", "--rank 1.0e400", "--rank='1.0e400': must be a whole number"),
        ("finetune --data x", "--layers 1.5", "'1.5': must be a whole number"),
        ("finetune --data x", '--rank-pattern {"q":4.6}', "must be a whole number"),
        ("finetune --data x", "--rank-pattern 4", "must be name=value, as in q=4,v=8"),
        ("finetune --data x", "--rank-pattern q=4 --rank-pattern q=5", "multiple times"),
        ("finetune --data x", '--rank-pattern {"q":1e400}', "unable to convert"),
        ("finetune --data x", '--rank-pattern {"q":4,"q":5}', "'q' is given twice"),
        ("finetune --data x", "--rank-pattern.q 4.6", "--rank-pattern[q]='4.6'"),
        ("sweep --data x", "--rank 4.6", "--rank='4.6': must be a whole number"),
        ("sweep --data x", "--rank 4.6,8", "--rank='4.6': must be a whole number"),
        ("finetune --data x", "--devices abc", "--devices='abc': must be a whole number, or all"),
        ("finetune --data x", "--devices -1", "Cannot use --devices -1"),
        ("finetune --data x --device cpu", "--devices 9", "a micro-batch has 8 sequences"),
        ("eval x", "--answers some", "--answers='some': must be a whole number, or all"),
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


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--targets q_proj,v_proj", "targets", ("q_proj", "v_proj")),
        ("--targets q_proj --targets v_proj", "targets", ("q_proj", "v_proj")),
        ("--targets a{1,2}", "targets", "a{1,2}"),
        ("--targets .*(q|v)_proj", "targets", ".*(q|v)_proj"),
        ("--exclude lm_head,model.layers.0", "exclude", ("lm_head", "model.layers.0")),
        ("--modules-to-save a --modules-to-save b,c", "modules_to_save", ("a", "b", "c")),
        ("--layers 0,1", "layers", (0, 1)),
        ("--layers 0 --layers 1,2", "layers", (0, 1, 2)),
        ("--layers [0,1]", "layers", (0, 1)),
        ("--rank-pattern q_proj=4,v_proj=8", "rank_pattern", {"q_proj": 4, "v_proj": 8}),
        ("--rank-pattern q=4 --rank-pattern v=8", "rank_pattern", {"q": 4, "v": 8}),
        ("--rank-pattern.q 4 --rank-pattern=v=8", "rank_pattern", {"q": 4, "v": 8}),
        ("--rank-pattern layers.0.q=4", "rank_pattern", {"layers.0.q": 4}),
        ("--rank-pattern.layers.0.q 4", "rank_pattern", {"layers.0.q": 4}),
        ('--rank-pattern {"q":4,"v":8}', "rank_pattern", {"q": 4, "v": 8}),
        ("--alpha-pattern q=0.5", "alpha_pattern", {"q": 0.5}),
    ],
)
def test_lists_are_written_with_commas_or_by_repetition(
    words: str, name: str, value: object
) -> None:
    given = name_pairs(["finetune", "--data", "x", *words.split()])
    _, bound, _ = build_app().parse_args(given, exit_on_error=False, print_error=False)
    assert getattr(bound.arguments["lora"], name) == value


@pytest.mark.parametrize("way", ["file", "environment"])
def test_lists_are_split_from_every_source(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"layers": "0,1", "targets": "q,v", "rank-pattern": "q=4,v=8"}
    if way == "environment":
        for key, text in settings.items():
            monkeypatch.setenv(f"LORALM_FINETUNE_{key.replace('-', '_').upper()}", text)
    app = build_app("finetune", [(settings if way == "file" else {}, "settings.yaml")])
    words = ["finetune", "--data", "x"]
    _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    lora = bound.arguments["lora"]
    assert (lora.layers, lora.targets) == ((0, 1), ("q", "v"))
    assert lora.rank_pattern == {"q": 4, "v": 8}


def test_commas_of_prompts_and_paths_are_kept() -> None:
    words = ["generate", "red, green", "a,b"]
    _, bound, _ = build_app().parse_args(words, exit_on_error=False, print_error=False)
    assert bound.arguments["prompts"] == ["red, green", "a,b"]


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
    app = build_app("finetune", [(settings, "settings.yaml")])
    _, bound, _ = app.parse_args(["finetune"], exit_on_error=False, print_error=False)
    assert bound.arguments["data"] == tmp_path / "x"
    assert bound.arguments["report"] is False
    assert bound.arguments["lora"].rank == 4
