from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from lora.cli import main
from lora.config import LoRAConfig, TrainConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of three steps that is under way."""
    run = tmp_path / "orders"
    run.mkdir()
    asked = {"model": "tiny", "lora": asdict(LoRAConfig()), "train": asdict(TrainConfig(steps=9))}
    (run / "run.json").write_text(json.dumps(asked))
    rows = [{"step": 0, "eval_loss": 2.0}, {"step": 3, "loss": 1.0}, {"step": 3, "eval_loss": 1.1}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_a_run_gets_its_report_into_its_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "Validation loss went from 2.0000 to 1.1000" in out
    assert "3 of 9" in out
    assert str(folder / "report.html") in out.replace("\n", "")
    assert (folder / "report.html").is_file()
    assert (folder / "pictures" / "loss_by_steps.png").is_file()


def test_out_title_and_json(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["report", str(folder), "--out", str(tmp_path / "deep" / "out"), "--title", "Mine"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Mine"
    assert "<h1>Mine</h1>" in (tmp_path / "deep" / "out" / "report.html").read_text()
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda run: run.with_name("ordrs"), "Did you mean 'orders'?"),
        (lambda run: run.parent, "it has no run.json. It contains the runs orders."),
        (lambda run: run / "metrics.jsonl", "is a file"),
    ],
)
def test_what_is_no_run_is_refused(
    folder: Path, make: object, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(make)
    assert main(["report", str(make(folder)), "--out", str(folder / "out")]) == 2
    assert told in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_no_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 2
    assert "Give at least one run directory" in capsys.readouterr().err


def test_empty_metrics_are_told_as_they_stand(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "metrics.jsonl").write_text("")
    assert main(["report", str(folder)]) == 0
    assert "Nothing has been measured yet" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = folder / "run.json"
    assert main(["report", str(folder), "--out", str(taken)]) == 2
    assert "Cannot write " in capsys.readouterr().err


def test_a_former_report_is_replaced_and_what_is_none_is_kept(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("my own page")
    words = ["report", str(folder), "--out", str(out)]
    assert main(words) == 2
    assert "the file exists" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["report.html"]
    assert (out / "report.html").read_text() == "my own page"
    assert main([*words, "--overwrite"]) == 0
    assert main(words) == 0
    assert {path.name for path in out.iterdir()} == {"report.html", "report.json", "pictures"}


def test_links_of_a_stranger_s_run_are_not_written_through(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "page").write_text("mine")
    (folder / "pictures").symlink_to(elsewhere)
    assert main(["report", str(folder)]) == 2
    assert "a symbolic link" in capsys.readouterr().err
    (folder / "pictures").unlink()
    (folder / "report.html").symlink_to(elsewhere / "page")
    assert main(["report", str(folder), "--overwrite"]) == 2
    assert "it is a symbolic link" in capsys.readouterr().err
    assert [path.name for path in elsewhere.iterdir()] == ["page"]
    assert (elsewhere / "page").read_text() == "mine"
