"""docs/formats.md: each row that it shows becomes what it says."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from lora.config import DataConfig
from lora.data.prompting.pairs import PAIRS
from lora.data.prompting.rules import rules_for
from lora.data.reading.formats import FORMATS, Example
from lora.data.reading.readers import read_examples

PAGE = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
_ROWS = r"((?:[^\n]+\n)*)\n```(?:json|text)\n(\{.*?)^```\n"
BLOCK = re.compile(rf"{_ROWS}(?:\n```text\n(.*?)^```\n)?", re.M | re.S)


def cases() -> list[Any]:
    """Return the text above each block of rows, the rows, and what the next block says of them."""
    return [pytest.param(*case, id=case[1][:40]) for case in BLOCK.findall(PAGE)]


def settings_in(text: str) -> DataConfig:
    """Return the settings that a text shows as flags after "With"."""
    found = re.search(r"With\s`(--[^`]+)`", text)
    words = shlex.split(found[1]) if found else []
    values: dict[str, Any] = {"raw": True} if "--raw" in words else {}
    for flag, value in itertools.pairwise(words):
        if flag == "--columns":
            values["columns"] = dict(pair.split("=") for pair in value.split(","))
        elif flag == "--template":
            values["template"] = value
    return DataConfig(**values)


def shown(example: Example) -> str:
    if example.messages is None:
        parts = {"text": example.text, "prompt": example.prompt, "completion": example.completion}
        return "\n".join(f"{name}: {value}" for name, value in parts.items() if value is not None)
    lines = []
    for number, message in enumerate(example.messages):
        is_context = message["role"] == "assistant" and number not in example.answers
        lines.append(f"{message['role']}{' (context)' * is_context}: {message['content']}")
    return "\n".join(lines)


@pytest.mark.parametrize(("before", "rows", "said"), cases())
def test_rows_become_what_the_page_says(before: str, rows: str, said: str) -> None:
    rules = rules_for(settings_in(before), has_template=True)
    examples = read_examples([json.loads(line) for line in rows.splitlines()], rules=rules)
    if said:
        assert "\n".join(map(shown, examples)) == said.rstrip("\n")
    for example in examples:
        assert example.answers or example.completion or example.text


def test_every_format_and_pair_is_on_the_page() -> None:
    examples = [
        example
        for case in cases()
        for example in read_examples(
            [json.loads(line) for line in case.values[1].splitlines()],
            rules=rules_for(settings_in(case.values[0]), has_template=True),
        )
    ]
    found = {example.format for example in examples}
    assert found == {*FORMATS, *(pair.format for pair in PAIRS), "template"}
