"""Adapters are asked the way they were trained: by the commands, after a merge, when resumed."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora.cli import main
from lora.data.prompting.prompt_format import read_prompt_format
from lora.runs.disk import read_json
from lora.runs.record import PromptFormat

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(30)]
SETTINGS = ["--batch-size", "2", "--max-length", "128", "--no-report"]


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def train(tiny_folder: Path, sums: Path, out: Path, *words: str, steps: int = 1) -> Path:
    start = ["finetune", "--model", str(tiny_folder), "--data", str(sums), "--out", str(out)]
    assert main([*start, "--name", "run", "--steps", str(steps), *SETTINGS, *words]) == 0
    return out / "run" / "adapter"


class Prompts:
    """Keeps the texts of the prompts that reach the model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ids: list[list[int]] = []
        monkeypatch.setattr("lora.inference.generate._generate", self)

    def __call__(self, model: Any, prompts: Any, *rest: Any) -> list[list[int]]:
        self.ids += [list(prompt) for prompt in prompts]
        return [[] for _ in prompts]

    def texts(self, folder: Path) -> list[str]:
        from lora.data.tokenizers.subword import load_tokenizer

        tokenizer, ids = load_tokenizer(folder), self.ids
        self.ids = []
        return [tokenizer.decode(each, skip_special_tokens=False) for each in ids]


CHAT = "<|im_start|>user\n1 + 1 =<|im_end|>\n<|im_start|>assistant\n"


def test_prompts_and_completions_are_turns_of_a_chat_model(
    tiny_folder: Path,
    sums: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = train(tiny_folder, sums, tmp_path, "--system", "Add.")
    system = "<|im_start|>system\nAdd.<|im_end|>\n"
    expected = PromptFormat("chat", "turns", "Add.")
    assert read_prompt_format(adapter) == expected
    assert read_json(adapter.parent / "run.json")["data"]["prompt_format"]["system"] == "Add."
    model = ["--model", str(tiny_folder), "--adapter", str(adapter)]
    prompts = Prompts(monkeypatch)
    capsys.readouterr()
    assert main(["generate", "1 + 1 =", *model]) == 0
    assert "with the system prompt 'Add.'" in capsys.readouterr().err
    assert main(["generate", "1 + 1 =", "--system", "", *model]) == 0
    assert main(["generate", "1 + 1 =", "--raw", *model]) == 0
    assert main(["eval", str(sums), "--answers", "2", *model]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("1 + 1 =\n"))
    assert main(["chat", *model]) == 0
    texts = prompts.texts(tiny_folder)
    assert texts[:3] == [system + CHAT, CHAT, "1 + 1 ="]
    assert texts[4] == texts[6] == texts[7] == system + CHAT  # eval of base and adapter; chat
    merged = tmp_path / "merged"
    assert main(["merge", str(adapter), str(merged), "--model", str(tiny_folder)]) == 0
    assert read_prompt_format(merged) == expected
    assert main(["generate", "1 + 1 =", "--model", str(merged)]) == 0
    assert prompts.texts(tiny_folder) == [system + CHAT]


def test_plain_text_is_continued_by_adapters_trained_on_it(
    tiny_folder: Path,
    sums: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = train(tiny_folder, sums, tmp_path, "--raw")
    model = ["--model", str(tiny_folder), "--adapter", str(adapter)]
    prompts = Prompts(monkeypatch)
    assert main(["generate", "1 + 1 =", *model]) == 0
    assert main(["generate", "1 + 1 =", "--no-raw", *model]) == 0
    assert main(["eval", str(sums), "--answers", "2", *model]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("0 + 1 =\n1 + 1 =\n"))
    assert main(["chat", *model]) == 0
    texts = prompts.texts(tiny_folder)
    assert texts[:2] == ["1 + 1 =", CHAT]
    assert texts[2:] == ["0 + 1 =", "1 + 1 ="] * 3  # base, adapter, chat without earlier lines
    assert main(["generate", "x", "--system", "Add.", *model]) == 2
    assert "Cannot use a system prompt with plain text" in capsys.readouterr().err


def test_runs_and_adapters_without_the_record_stay_as_they_were(
    tiny_folder: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = train(tiny_folder, sums, tmp_path, "--raw")
    (adapter / "prompt_format.json").unlink()
    path = adapter.parent / "run.json"
    recorded = read_json(path)
    del recorded["data"]["prompt_format"], recorded["data_config"]["raw"]
    path.write_text(json.dumps(recorded), encoding="utf-8")
    prompts = Prompts(monkeypatch)
    model = ["--model", str(tiny_folder), "--adapter", str(adapter)]
    assert main(["generate", "1 + 1 =", *model]) == 0
    assert main(["eval", str(sums), "--answers", "2", *model]) == 0
    texts = prompts.texts(tiny_folder)
    assert texts == [CHAT, *["0 + 1 =", "1 + 1 ="] * 2]
    train(tiny_folder, sums, tmp_path, "--resume", steps=2)
    assert read_prompt_format(adapter) == PromptFormat("raw", "raw")


def test_a_csv_of_tickets_is_learned_asked_and_evaluated_alike(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [f"ticket {n},{'billing' if n % 2 else 'shipping'}" for n in range(20)]
    path = tmp_path / "tickets.csv"
    path.write_text("\n".join(["ticket,team", *rows]), encoding="utf-8")
    words = ["--columns", "text=ticket,label=team"]
    adapter = train(tiny_folder, path, tmp_path, *words)
    assert "classification of 20 texts, 2 labels: billing (10)" in capsys.readouterr().err
    test = tmp_path / "test.csv"
    test.write_text("ticket,team\nticket 3,billing\n", encoding="utf-8")  # one label of two
    prompts = Prompts(monkeypatch)
    model = ["--model", str(tiny_folder), "--adapter", str(adapter)]
    assert main(["generate", "ticket 3", *model]) == 0
    assert main(["eval", str(test), "--answers", "1", *model]) == 0
    texts = prompts.texts(tiny_folder)
    assert "Answer with one of: billing, shipping.\n\nText: ticket 3\n\nLabel:" in texts[0]
    assert texts == [texts[0]] * 3
    resume = ["finetune", "--resume", "--name", "run", "--out", str(tmp_path), "--steps", "2"]
    assert main([*resume, "--no-report"]) == 0  # columns and labels are those of the record


def test_a_template_is_followed(
    tiny_folder: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--template", r"Add {prompt}\nSum: {completion}", "--raw"]
    adapter = train(tiny_folder, sums, tmp_path, *words)
    prompts = Prompts(monkeypatch)
    model = ["--model", str(tiny_folder), "--adapter", str(adapter)]
    assert main(["generate", "1 + 1 =", *model]) == 0
    shutil.move(adapter, tmp_path / "alone")  # without the run's record
    model = ["--model", str(tiny_folder), "--adapter", str(tmp_path / "alone")]
    assert main(["eval", str(sums), "--answers", "2", *model]) == 0
    texts = prompts.texts(tiny_folder)
    assert texts[0] == "Add 1 + 1 =\nSum:"
    assert set(texts) == {"Add 0 + 1 =\nSum:", "Add 1 + 1 =\nSum:"}
