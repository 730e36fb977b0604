"""Templates of rows: where the prompt ends, what is learned, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from lora.config import DataConfig
from lora.data.prompting.row_template import parse_template
from lora.data.prompting.rules import ReadingRules, rules_for
from lora.data.reading.formats import Example, example_from_row
from lora.errors import ConfigError, DataError

TICKET = {"text": "My parcel is late", "label": "shipping", "id": 7}


@pytest.mark.parametrize(
    ("source", "prompt", "completion"),
    [
        (r"{text}\nLabel: {label}", "My parcel is late\nLabel:", " shipping"),
        ("{text} => {label}.", "My parcel is late =>", " shipping."),
        ("Ticket {id}: {text}\n\n{label}", "Ticket 7: My parcel is late", "\n\nshipping"),
        ("{text}\n[[{label} ({id})]]", "My parcel is late", "\nshipping (7)"),
        ('{text}\n[[{{"label": "{label}"}}]]\n', "My parcel is late", '\n{"label": "shipping"}'),
        ("Write a ticket.[[ {text} ]]", "Write a ticket.", " My parcel is late "),
        ("{text}{label}", "My parcel is late", "shipping"),
    ],
)
def test_what_is_learned_begins_with_the_last_column_or_the_mark(
    source: str, prompt: str, completion: str
) -> None:
    assert parse_template(source).fill(TICKET) == (prompt, completion)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("Label:", "names no column in braces"),
        ("{text}", "nothing stands before what is learned; for plain text take columns"),
        ("[[{text} {label}]]", "nothing stands before what is learned"),
        ("{text}: {}", "'{}' names no column"),
        ("{text: {label}", "'{' names no column"),
        ("{text} [[{label}", r"'\]\]' is missing"),
        ("{text} {label}]]", r"'\]\]' comes without"),
        ("{text} [[{label}]] [[{id}]]", r"'\[\[' is there twice|' ' comes after|comes after"),
        ("{text} [[{label}]] and on", "' and on' comes after"),
        ("{text} [[yes]]", "no column is in what is learned"),
    ],
)
def test_templates_that_do_not_say_what_to_learn_are_refused(source: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"Cannot use the template.*({words}).*Try"):
        parse_template(source)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"txt": "a", "label": "b"}, "no column 'text'. Columns here: txt, label. Did you mean"),
        ({"text": "a", "label": " "}, "label is empty: there is nothing to learn"),
        ({"text": "a", "label": None}, "label is empty: there is nothing to learn"),
        ({"text": "a", "label": ["b"]}, "label is a list: a text or a number is needed"),
    ],
)
def test_rows_that_do_not_fit_are_refused(row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        parse_template("{text}: {label}").fill(row)


def test_values_are_written_as_they_are() -> None:
    filled = parse_template("{a} {b} {c}|{d}").fill({"a": 3, "b": True, "c": None, "d": 0.5})
    assert filled == ("3 true |", "0.5")


def read(row: Any, template: str, has_template: bool = True, **settings: Any) -> Example:
    config = DataConfig(template=template, **settings)
    return example_from_row(row, "f:1", rules_for(config, has_template=has_template))


def test_a_template_makes_turns_of_a_chat_model_and_plain_text_else() -> None:
    template = r"{text}\nLabel: {label}"
    example = read(TICKET, template)
    assert example.messages == (
        {"role": "user", "content": "My parcel is late\nLabel:"},
        {"role": "assistant", "content": "shipping"},
    )
    assert (example.columns, example.unused_columns) == (("text", "label"), ("id",))
    for plain in (read(TICKET, template, has_template=False), read(TICKET, template, raw=True)):
        assert (plain.prompt, plain.completion) == ("My parcel is late\nLabel:", " shipping")
    system = read({**TICKET, "system": "Sort.", "context": "unused"}, template)
    assert (system.messages or ())[0] == {"role": "system", "content": "Sort."}
    assert system.unused_columns == ("id", "context")
    assert read({**TICKET, "weight": 0}, template).is_context
    assert read({"messages": 3, **TICKET}, template).format == "template"


def mapped(row: Any, **columns: str) -> Example:
    return example_from_row(row, "f:1", ReadingRules(as_turns=True, columns=columns))


def test_columns_get_the_names_of_their_parts() -> None:
    row = {"Frage": "q", "Antwort": "a", "prompt": "other", "id": 7}
    example = mapped(row, prompt="Frage", completion="Antwort")
    assert [m["content"] for m in example.messages or ()] == ["q", "a"]
    assert example.columns == ("Frage (as prompt)", "Antwort (as completion)")
    assert example.unused_columns == ("id", "prompt")
    swapped = mapped({"prompt": "a", "completion": "q"}, prompt="completion", completion="prompt")
    assert [m["content"] for m in swapped.messages or ()] == ["q", "a"]
    assert swapped.unused_columns == ()
    # The parts that are named go before what else the row has.
    named = mapped(
        {"messages": [], "q": "q", "a": "a", "c": "c"}, question="q", answer="a", context="c"
    )
    assert [m["content"] for m in named.messages or ()] == ["q\n\nc", "a"]
    assert mapped({"q": "q", "answer": "a"}, question="q").format == "question and answer"
    assert mapped({"body": "t", "label": 1}, text="body", label="").text == "t"


@pytest.mark.parametrize(
    ("row", "columns", "words"),
    [
        (
            {"question": "q", "answer": "a"},
            {"prompt": "qestion", "completion": "answer"},
            "no column 'qestion'.*Columns here: question, answer. Did you mean 'question'",
        ),
        ({"q": "q", "a": "a", "t": "t"}, {"prompt": "q", "completion": "a", "input": "t"}, "input"),
        ({"q": "q", "a": "a"}, {"prompt": "q"}, "keys prompt, a|keys a, prompt fit no format"),
    ],
)
def test_columns_that_do_not_fit_are_refused(row: Any, columns: dict[str, str], words: str) -> None:
    with pytest.raises(DataError, match=words):
        mapped(row, **columns)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"promt": "q"}, "'promt' is no part.*Did you mean 'prompt'.*Write part=column"),
        ({"prompt": "q", "completion": "q"}, "'q' is named for two parts"),
    ],
)
def test_mappings_that_cannot_be_meant_are_refused(columns: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rules_for(DataConfig(columns=columns), has_template=True)
