"""`lora eval` on a tiny model: predictions, scores and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora.cli import main
from lora.runs.progress import LINE_INTERVAL_S, StageProgress

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def labels_file(tmp_path: Path) -> Path:
    """Six tickets with one of two labels, one of them in a conversation of two turns."""
    path = tmp_path / "tickets.jsonl"
    pairs = [(f"ticket {n}", "refund" if n % 2 else "bug") for n in range(4)]
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in pairs
    ]
    rows.append({"messages": [turn for row in rows[:2] for turn in row["messages"]]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def adapter(tiny_folder: Path, labels_file: Path, tmp_path: Path, capsys: Capture) -> Path:
    """One of two steps."""
    words = ["finetune", "--model", str(tiny_folder), "--data", str(labels_file), "--rank", "8"]
    words += ["--eval-data", str(labels_file), "--steps", "2", "--batch-size", "2", "--samples"]
    words += ["0", "--max-length", "64", "--learning-rate", "0.02", "--no-report"]
    words += ["--out", str(tmp_path / "runs"), "--name", "run"]
    assert main(words) == 0
    capsys.readouterr()
    return tmp_path / "runs" / "run" / "adapter"


def test_predictions_have_each_answer_with_its_scores(
    tiny_folder: Path, adapter: Path, labels_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    written = tmp_path / "answers.jsonl"
    words = ["eval", str(labels_file), "--model", str(tiny_folder), "--adapter", str(adapter)]
    words += ["--max-new-tokens", "6", "--json", "--predictions", str(written)]
    assert main(words) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    rows = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == found["adapter"]["n_answers"] == 6  # both turns of the conversation
    assert [row["turn"] for row in rows] == [1, 1, 1, 1, 1, 2]
    assert rows[0]["source"] == f"{labels_file}:1"
    assert [row["expected"] for row in rows] == ["bug", "refund"] * 3
    right = [row["answer"].strip() == row["expected"] for row in rows]
    assert [row["scores"]["exact_match"] for row in rows] == right
    assert sum(right) == found["adapter"]["exact_match"]
    assert {"label", "label_right"} <= rows[0]["scores"].keys()
    assert {"base_answer", "base_scores"} <= rows[0].keys()
    labelled = found["adapter"]["classification"]
    assert labelled["accuracy"] * 6 == pytest.approx(
        sum(row["scores"]["label_right"] for row in rows)
    )
    assert [label["label"] for label in labelled["labels"]] == ["bug", "refund"]
    assert sum(map(sum, labelled["confusion"])) == 6
    assert f"predictions: {written}" in err
    assert main(words) == 2
    assert "the file exists" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--no-base"]) == 0
    out = capsys.readouterr().out
    assert list(json.loads(out)) == ["adapter"]
    row = json.loads(written.read_text(encoding="utf-8").splitlines()[0])
    assert "base_answer" not in row
    assert main(["eval", str(labels_file), "--model", str(tiny_folder), "--no-base"]) == 2
    assert "Cannot use --no-base without --adapter" in capsys.readouterr().err


def test_tables_show_labels_fields_and_cut_answers(
    tiny_folder: Path, labels_file: Path, orders_file: Path, capsys: Capture
) -> None:
    words = ["--model", str(tiny_folder), "--max-new-tokens", "2", "--answers", "all"]
    assert main(["eval", str(labels_file), *words]) == 0
    out, err = capsys.readouterr()
    for seen in ("accuracy", "macro-F1", "precision", "Confusion matrix", "(no label)"):
        assert seen in out
    assert "6 of 6 answers reached --max-new-tokens 2 and are cut" in err
    words[-1] = "3"
    assert main(["eval", str(orders_file), *words]) == 0
    out = capsys.readouterr().out
    assert "0/18 (0.0%)" in out
    assert "customer" in out
    assert "accuracy" not in out


def test_without_answers_the_way_to_them_is_told(
    tiny_folder: Path, labels_file: Path, capsys: Capture
) -> None:
    assert main(["eval", str(labels_file), "--model", str(tiny_folder)]) == 0
    assert "Only the loss was measured. --answers 40, or all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["--metrics", "json-fields"], "not every reference answer is a JSON object"),
        (["--metrics", "acuracy"], "metrics='acuracy': must be one of auto, exact-match"),
        (["--answers", "0", "--predictions", "p.jsonl"], "Cannot write predictions: --answers is"),
        (["--overwrite"], "Cannot use --overwrite without --predictions"),
        (["--predictions", "nowhere/p.jsonl"], "there is no directory nowhere"),
        (["--predictions", "{data}", "--overwrite"], "is read by this command"),
    ],
)
def test_what_cannot_be_scored_or_written_is_refused(
    words: list[str], seen: str, tiny_folder: Path, labels_file: Path, capsys: Capture
) -> None:
    before = labels_file.read_bytes()
    given = [word.replace("{data}", str(labels_file)) for word in words]
    assert main(["eval", str(labels_file), "--model", str(tiny_folder), *given]) == 2
    assert seen in capsys.readouterr().err
    assert labels_file.read_bytes() == before


def test_progress_without_a_terminal_is_a_line_now_and_then(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [0.0]
    monkeypatch.setattr("lora.runs.progress.time.monotonic", lambda: now_s[0])
    with StageProgress() as progress:
        for done in range(5):
            now_s[0] += LINE_INTERVAL_S / 2 + 0.1
            progress.update("adapter: answers", done, 5)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["adapter: answers: 1/5", "adapter: answers: 3/5"]
