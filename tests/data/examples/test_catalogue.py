"""Example data: what the commands read, the same each time, parts that share no words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora.cli import main
from lora.data.examples.catalogue import EXAMPLES, PARTS, example_text
from lora.data.examples.tickets import LABELS, make_tickets
from lora.data.examples.tools import TOOLS, make_tool_chats
from lora.data.reading.readers import read_examples
from lora.errors import ConfigError


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("part", PARTS)
def test_each_part_is_read_whole(name: str, part: str, tmp_path: Path) -> None:
    text = example_text(name, part)  # type: ignore[arg-type]
    assert text == example_text(name, part)  # type: ignore[arg-type]
    assert text != example_text(name, part, seed=1)  # type: ignore[arg-type]
    path = tmp_path / f"data{EXAMPLES[name].suffix}"
    path.write_text(text, encoding="utf-8")
    assert len(read_examples(path)) == EXAMPLES[name].n_rows[part]
    path.write_text(example_text(name, part, 8), encoding="utf-8")  # type: ignore[arg-type]
    assert len(read_examples(path)) == 8


def test_tickets_are_balanced_and_their_test_part_is_new() -> None:
    rows = make_tickets("train", 40)
    assert [row["label"] for row in rows] == list(LABELS) * 10
    assert not {row["text"] for row in rows} & {row["text"] for row in make_tickets("test", 40)}


def test_calls_fit_the_tools_that_are_offered() -> None:
    known = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    rows = make_tool_chats("train", 60)
    calls = [
        turn["tool_calls"][0] for row in rows for turn in row["messages"] if "tool_calls" in turn
    ]
    assert {call["function"]["name"] for call in calls} == set(known)
    for call in calls:
        required = known[call["function"]["name"]]["required"]
        assert sorted(call["function"]["arguments"]) == sorted(required)
    assert len(rows) > len(calls) > len(rows) / 2
    results = [
        turn["content"] for row in rows for turn in row["messages"] if turn["role"] == "tool"
    ]
    assert all(isinstance(json.loads(result), dict) for result in results)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ordres",), "Did you mean 'orders'"),
        (("orders", "trian"), "Did you mean 'train'"),
        (("orders", "train", 0), "Cannot make 0 rows"),
        (("tickets", "test", 9_999), "fewer different ones"),
        (("tools", "test", 9_999), "fewer different ones"),
        (("orders", "test", 99_999), "Cannot make 99999 rows. Allowed: 1 to 10,000"),
    ],
)
def test_what_there_is_not_is_refused(arguments: tuple[object, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        example_text(*arguments)  # type: ignore[arg-type]


def test_the_command_lists_and_writes(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["example"]) == 0
    listed = capfd.readouterr().out
    assert all(name in listed for name in EXAMPLES)
    assert main(["example", "tickets", "--rows", "4"]) == 0
    written = capfd.readouterr()
    assert written.out == example_text("tickets", rows=4)
    assert "next: lora finetune tickets.csv" in written.err
    assert main(["example", "orders", "--part", "test"]) == 0
    assert capfd.readouterr() == (example_text("orders", "test"), "")
    assert main(["example", "--rows", "3"]) == 2
    assert "Name the data: orders, tickets, tools" in capfd.readouterr().err
    assert main(["example", "order"]) == 2
    assert "Did you mean 'orders'" in capfd.readouterr().err
