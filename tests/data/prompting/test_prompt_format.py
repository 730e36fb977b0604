"""How a model was prompted: found in examples, kept in a file, followed by questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora.config import DataConfig
from lora.data.chat.prompts import chat_prompt, plain_prompt
from lora.data.prepare import prepare_data
from lora.data.prompting.ask import Asker
from lora.data.prompting.prompt_format import (
    PROMPT_FORMAT_FILE,
    read_prompt_format,
    save_prompt_format,
)
from lora.data.prompting.rules import ReadingRules, rules_for
from lora.data.reading.formats import Example, example_from_row
from lora.data.reading.readers import read_examples
from lora.data.tokenizers.subword import TextTokenizer
from lora.errors import ConfigError, DataError
from lora.runs.record import PromptFormat

ROW = {"prompt": "2 + 3 =\n", "completion": " 5"}
TURNS = ({"role": "user", "content": "2 + 3 ="}, {"role": "assistant", "content": "5"})
SYSTEM = {"role": "system", "content": "Be brief."}
CONFIG = DataConfig(max_length=128, eval_fraction=0)


def read(row: Any, **rules: Any) -> Example:
    return example_from_row(row, "f:1", ReadingRules(as_turns=True, **rules))


def test_a_prompt_and_its_completion_are_turns_without_the_space_between_them() -> None:
    assert read(ROW).messages == TURNS
    assert read(ROW).answers == [1]
    assert read({**ROW, "system": "Be brief."}).messages == (SYSTEM, *TURNS)
    assert read({**ROW, "history": [["a", "b"]]}).answers == [3]
    assert read({**ROW, "weight": 0}).is_context
    assert read({"prompt": [TURNS[0]], "completion": [TURNS[1]]}).messages == TURNS


def test_a_system_prompt_is_for_conversations_that_have_none() -> None:
    assert read(ROW, system="Be brief.").messages == (SYSTEM, *TURNS)
    own = {**ROW, "system": "Be long."}
    assert (read(own, system="Be brief.").messages or ())[0]["content"] == "Be long."
    for rules in (ReadingRules(system="x"), ReadingRules(as_turns=True, system="x")):
        with pytest.raises(DataError, match="setting system has no place in the format text"):
            example_from_row({"text": "t"}, "f:1", rules)


def test_plain_text_that_is_asked_for_refuses_conversations() -> None:
    raw = rules_for(DataConfig(raw=True), has_template=True)
    assert example_from_row(ROW, "f:1", raw).completion == " 5"
    for row in ({"messages": list(TURNS)}, {"question": "q", "answer": "a"}):
        with pytest.raises(DataError, match="raw is for prompt and completion or text"):
            example_from_row(row, "f:1", raw)


@pytest.mark.parametrize(
    "config",
    [
        DataConfig(columns={"prompt": "text"}),
        DataConfig(template="{a}: {b}"),
        DataConfig(system="Be brief."),
    ],
)
def test_settings_of_rows_are_refused_with_text_files(tmp_path: Path, config: DataConfig) -> None:
    path = tmp_path / "a.txt"
    path.write_text("A text.")
    with pytest.raises(DataError, match="has no place in a text file: leave it out"):
        read_examples(path, rules=rules_for(config, has_template=True))


@pytest.mark.parametrize(
    ("raw", "has_template", "trained", "as_turns"),
    [
        (None, True, None, True),
        (None, False, None, False),
        (False, False, None, True),
        (True, True, PromptFormat(completions="turns"), False),
        (None, True, PromptFormat(completions="raw"), False),
        (None, False, PromptFormat(completions="turns"), True),
    ],
)
def test_the_setting_goes_before_the_adapter_and_that_before_the_model(
    raw: bool | None, has_template: bool, trained: PromptFormat | None, as_turns: bool
) -> None:
    found = rules_for(DataConfig(raw=raw), has_template=has_template, trained=trained)
    assert found.as_turns is as_turns


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"raw": True, "system": "s"}, "system='s': it needs turns, so leave it out with raw"),
        ({"raw": True, "chat_template": Path("a.jinja")}, "chat_template='a.jinja': leave it out"),
        ({"template": ""}, "template='': it names no column"),
        (
            {"template": "{a}{b}", "columns": {"text": "a"}},
            "columns=.*leave them out with template",
        ),
        ({"columns": {"text": 3}}, "columns=.*must be a mapping of parts to columns"),
        (
            {"raw": "yes", "template": 3},
            "raw='yes': must be of type bool(.|\n)*template=3: must be",
        ),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rules_for(DataConfig(**settings), has_template=True)


@pytest.mark.parametrize(
    ("rows", "config", "expected"),
    [
        ([ROW], CONFIG, PromptFormat("chat", "turns")),
        ([ROW], DataConfig(raw=True, eval_fraction=0), PromptFormat("raw", "raw")),
        ([{"text": "a text"}], CONFIG, PromptFormat("raw", "turns")),
        (
            [ROW, {"messages": [SYSTEM, *TURNS]}],
            DataConfig(system="Be brief.", eval_fraction=0),
            PromptFormat("chat", "turns", "Be brief."),
        ),
        ([ROW, {"messages": [SYSTEM, *TURNS]}], CONFIG, PromptFormat("chat", "turns")),
    ],
)
def test_data_tell_how_the_model_is_prompted(
    rows: list[Any], config: DataConfig, expected: PromptFormat, chatml_tokenizer: TextTokenizer
) -> None:
    assert prepare_data(rows, chatml_tokenizer, config, seed=1).prompts == expected


def test_models_without_a_chat_template_continue_plain_text(tokenizer: TextTokenizer) -> None:
    data = prepare_data([ROW], tokenizer, CONFIG, seed=1)
    assert data.prompts == PromptFormat("raw", "raw")
    assert data.train_examples[0].prompt == "2 + 3 =\n"


def test_the_file_is_read_as_it_was_saved(tmp_path: Path) -> None:
    assert read_prompt_format(tmp_path) is None
    prompts = PromptFormat("raw", "raw", "Sei höflich.")
    save_prompt_format(prompts, tmp_path)
    assert read_prompt_format(tmp_path) == prompts


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"format_version": 2}, "format_version=2, not 1"),
        ({"format_version": 1, "style": "song"}, "style"),
        ([], "not an object"),
    ],
)
def test_a_damaged_file_is_refused(content: object, words: str, tmp_path: Path) -> None:
    (tmp_path / PROMPT_FORMAT_FILE).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=rf"Cannot tell how the model was prompted(.|\n)*{words}"):
        read_prompt_format(tmp_path)


def test_questions_follow_training_unless_told_otherwise(chatml_tokenizer: TextTokenizer) -> None:
    plain = plain_prompt("hi", chatml_tokenizer).ids
    chat = chat_prompt([{"role": "user", "content": "hi"}], chatml_tokenizer).ids
    brief = chat_prompt([SYSTEM, {"role": "user", "content": "hi"}], chatml_tokenizer).ids
    raw, asked = PromptFormat("raw"), PromptFormat("chat", system="Be brief.")

    def ids(*settings: Any, **more: Any) -> list[int]:
        return Asker(*settings, **more).prompt("hi", chatml_tokenizer).ids

    assert ids(PromptFormat()) == ids(raw, False) == ids(asked, system="") == chat
    assert ids(raw) == ids(asked, True) == plain
    assert ids(asked) == ids(PromptFormat(), system="Be brief.") == brief
    assert Asker(PromptFormat()).describe() == Asker(raw, True).describe() == ""
    assert "plain text is continued (--no-raw" in Asker(raw).describe()
    assert "system prompt 'Be brief.'" in Asker(asked).describe()
    with pytest.raises(ConfigError, match="system prompt with plain text, as the adapter was"):
        Asker(raw, system="x")


def test_a_conversation_continues_where_the_model_learned_some(
    chatml_tokenizer: TextTokenizer,
) -> None:
    said = [*TURNS, {"role": "user", "content": "hi"}]
    whole = Asker(PromptFormat(system="Be brief.")).prompt_after(said, chatml_tokenizer)
    assert whole.ids == chat_prompt([SYSTEM, *said], chatml_tokenizer).ids
    alone = Asker(PromptFormat("raw")).prompt_after(said, chatml_tokenizer)
    assert alone.ids == plain_prompt("hi", chatml_tokenizer).ids
