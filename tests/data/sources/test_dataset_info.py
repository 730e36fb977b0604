"""LLaMA-Factory's dataset_info.json beside the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora.data.prompting.rules import ReadingRules
from lora.data.reading.readers import read_examples
from lora.errors import DataError


def write(folder: Path, entry: dict[str, Any], *rows: Any, name: str = "mine.json") -> Path:
    info = {"mine": {"file_name": name, **entry}, "other": {"hf_hub_url": "a/b"}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    path = folder / name
    path.write_text(json.dumps(list(rows)), encoding="utf-8")
    return path


def contents(path: Path, said: list[str] | None = None) -> list[str]:
    said = [] if said is None else said
    (example,) = read_examples(path, said.append)
    return [f"{m['role']}: {m['content']}" for m in example.messages or ()]


def test_columns_of_alpaca_have_the_names_that_it_says(tmp_path: Path) -> None:
    columns = {"prompt": "ask", "query": "about", "response": "say", "system": "who"}
    row = {"ask": "Summarise.", "about": "A text.", "say": "Short.", "who": "Be brief.", "id": 3}
    said: list[str] = []
    path = write(tmp_path, {"columns": columns, "num_samples": 9}, row)
    assert contents(path, said) == [
        "system: Be brief.",
        "user: Summarise.\n\nA text.",
        "assistant: Short.",
    ]
    assert said == [
        "mine.json as mine in dataset_info.json: instruction=ask, input=about, output=say, "
        "system=who",
        "dataset_info.json: not used of mine: num_samples",
    ]
    assert contents(tmp_path) == contents(path)
    path = write(tmp_path, {"columns": {"prompt": "body"}}, {"body": "A text."})
    assert read_examples(path)[0].text == "A text."


def test_tags_of_sharegpt_tell_the_roles(tmp_path: Path) -> None:
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "you"}
    call = '{"name": "f", "arguments": {}}'
    turns = [
        {"who": "me", "says": "hi"},
        {"who": "function_call", "says": call},
        {"who": "observation", "says": "3"},
        {"who": "you", "says": "Three."},
    ]
    entry = {"formatting": "sharegpt", "columns": {"messages": "chat"}, "tags": tags}
    path = write(tmp_path, entry, {"chat": turns})
    assert contents(path) == ["user: hi", "assistant: ", "tool: 3", "assistant: Three."]
    usual = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "Hello."}]
    path = write(tmp_path, {"formatting": "sharegpt"}, {"conversations": usual})
    assert contents(path) == ["user: hi", "assistant: Hello."]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"ranking": True}, "Cannot train on mine.*preference data"),
        ({"columns": {"prompt": "a", "kto_tag": "b"}}, "preference data"),
        ({"columns": {"promt": "a"}}, "columns for promt. Allowed: prompt, query"),
        ({"columns": ["a"]}, "must be texts by name"),
    ],
)
def test_what_cannot_be_used_is_refused(entry: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        read_examples(write(tmp_path, entry, {"a": "b"}))


def test_what_is_no_description_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, {}, {"question": "q", "answer": "a"})
    for text in ('{"features": {}, "splits": {}}', "[]", "{"):
        (tmp_path / "dataset_info.json").write_text(text, encoding="utf-8")
        assert contents(path) == ["user: q", "assistant: a"]


def test_a_description_one_directory_above_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"file_name": "sub/mine.json", "columns": {"prompt": "a", "response": "b"}}
    (tmp_path / "sub").mkdir()
    write(tmp_path, entry).unlink()
    (tmp_path / "sub" / "mine.json").write_text('[{"a": "q", "b": "r"}]', encoding="utf-8")
    monkeypatch.chdir(tmp_path / "sub")
    assert contents(Path("mine.json")) == ["user: q", "assistant: r"]


def test_the_settings_go_before_it(tmp_path: Path) -> None:
    path = write(tmp_path, {"columns": {"prompt": "b", "response": "a"}}, {"a": "x", "b": "y"})
    rules = ReadingRules(as_turns=True, columns={"prompt": "a", "completion": "b"})
    (example,) = read_examples(path, rules=rules)
    assert [m["content"] for m in example.messages or ()] == ["x", "y"]
