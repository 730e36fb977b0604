"""Classification: rows of a text and its label are asked for the label, with all labels listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora.config import DataConfig
from lora.data.inspection import inspect_data
from lora.data.prepare import prepare_data
from lora.data.prompting.ask import Asker
from lora.data.prompting.labels import MAX_LISTED_LABELS, label_template, sort_labels
from lora.data.prompting.rules import ReadingRules
from lora.data.reading.readers import read_examples, read_with_labels
from lora.data.tokenizers.subword import TextTokenizer
from lora.errors import DataError

CSV = (
    "text,label\n"
    "I was charged twice,billing\n"
    '"My parcel, the blue one, is late",shipping\n'
    "Where is my refund?,billing\n"
)
ASKED = "Which label fits the text? Answer with one of: billing, shipping.\n\nText: {}\n\nLabel:"
TURNS = ReadingRules(as_turns=True)


@pytest.fixture
def tickets(tmp_path: Path) -> Path:
    path = tmp_path / "tickets.csv"
    path.write_text(CSV, encoding="utf-8")
    return path


def test_a_csv_of_texts_and_labels_is_a_classification(tickets: Path) -> None:
    said: list[str] = []
    examples, rules = read_with_labels(tickets, said.append, TURNS)
    assert said == ["classification of 3 texts, 2 labels: billing (2), shipping (1)"]
    assert [m["content"] for m in examples[1].messages or ()] == [
        ASKED.format("My parcel, the blue one, is late"),
        "shipping",
    ]
    assert (examples[0].format, examples[0].columns) == ("text and label", ("text", "label"))
    assert rules.labels == ("billing", "shipping")
    plain = read_examples(tickets)
    assert (plain[0].prompt, plain[0].completion) == (
        ASKED.format("I was charged twice"),
        " billing",
    )


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ({"text": "fine", "label": 3}, "3"),
        ({"text": "fine", "label": True}, "true"),
        ({"sentence": "fine", "label": "pos"}, "pos"),
        ({"text": "fine", "label": 1, "label_text": "positive"}, "positive"),
    ],
)
def test_labels_are_words_numbers_or_names(row: dict[str, Any], label: str) -> None:
    (example,) = read_examples([row], rules=TURNS)
    assert (example.messages or ())[-1]["content"] == label
    assert example.unused_columns == ()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "fine", "label": " "}, "label is empty: a row of a classification needs"),
        ({"text": "fine", "label": None}, "label is null: a row of a classification needs"),
        ({"text": "fine", "label": ["a", "b"]}, "label is a list: a text or a number"),
        ({"text": 3, "label": "a"}, "text is a number"),
        ({"text": None, "label": "a"}, "text is null: a string"),
        ({"text": None, "label": None}, "label is empty"),
    ],
)
def test_rows_without_a_label_are_refused(row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_examples([{"text": "t", "label": "a"}, row])


def test_other_data_of_the_task_are_asked_with_the_labels_of_training(tickets: Path) -> None:
    _, rules = read_with_labels(tickets, lambda message: None, TURNS)
    said: list[str] = []
    rows = [{"text": "Hello", "label": "other"}, {"text": "Late", "label": "shipping"}]
    examples = read_examples(rows, said.append, rules=rules, part="test")
    assert (examples[0].messages or ())[0]["content"] == ASKED.format("Hello")
    (note,) = said
    assert "1 of 2 texts have a label that the training data did not have: other" in note
    # Training that is continued learns the new label beside the former ones.
    _, continued = read_with_labels(rows, said.append, rules)
    assert continued.labels == ("billing", "other", "shipping")
    _, continued = read_with_labels(rows[1:], said.append, rules)
    assert continued == rules
    assert said[-1] == "classification of 1 texts, 2 labels: billing (0), shipping (1)"


def test_the_prompt_depends_on_the_labels_alone() -> None:
    assert sort_labels(["b", "A", "b", "a"]) == ("A", "a", "b")
    assert sort_labels(["10", "9", "-1"]) == ("-1", "9", "10")
    many = [f"class {n}" for n in range(MAX_LISTED_LABELS + 1)]
    assert "Answer with the label alone." in label_template(many).source
    odd = label_template(["{x}", "[[y]]"])
    assert "one of: {x}, [ [y] ]." in odd.fill({"text": "t", "label": "{x}"})[0]


def test_a_record_lets_questions_be_asked_the_same_way(
    tickets: Path, chatml_tokenizer: TextTokenizer
) -> None:
    config = DataConfig(max_length=128, eval_fraction=0)
    data = prepare_data(tickets, chatml_tokenizer, config, seed=1)
    assert data.prompts.labels == ("billing", "shipping")
    assert data.prompts.template == data.prompts.label_template
    asker = Asker(data.prompts)
    text = chatml_tokenizer.decode(
        asker.prompt("It broke", chatml_tokenizer).ids, skip_special_tokens=False
    )
    assert f"<|im_start|>user\n{ASKED.format('It broke')}<|im_end|>" in text
    assert not asker.takes_turns
    assert "texts are put into 'Which label fits" in asker.describe()
    mixed = [{"text": "a", "label": "b"}, {"question": "q", "answer": "a"}]
    found = prepare_data(mixed, chatml_tokenizer, config, seed=1).prompts
    assert (found.template, found.labels) == (None, ("b",))


def test_templates_of_several_columns_take_objects(chatml_tokenizer: TextTokenizer) -> None:
    rows = [{"title": "Late", "body": "Where is it?", "team": "shipping"}]
    config = DataConfig(max_length=128, eval_fraction=0, template="{title}: {body}\n{team}")
    asker = Asker(prepare_data(rows, chatml_tokenizer, config, seed=1).prompts, raw=None)
    asked = asker.prompt('{"title": "Hi", "body": "There"}', chatml_tokenizer)
    assert "user\nHi: There<|im_end|>" in chatml_tokenizer.decode(
        asked.ids, skip_special_tokens=False
    )
    with pytest.raises(DataError, match=r"columns title, body. Give each prompt as a JSON object"):
        asker.prompt("Hi", chatml_tokenizer)


def test_the_inspection_shows_format_columns_and_likely_labels(
    tickets: Path, chatml_tokenizer: TextTokenizer
) -> None:
    report = inspect_data(tickets, chatml_tokenizer, DataConfig())
    assert report.formats == {"text and label": 3}
    assert report.columns == {"text": 3, "label": 3}
    assert any("2 labels: billing (2), shipping (1)" in note for note in report.notes)
    rows = [{"text": "t", "Sentiment": "good"}, {"text": "u", "Sentiment": "bad"}]
    (warning,) = inspect_data(rows, chatml_tokenizer, DataConfig()).warnings
    left_out = DataConfig(columns={"label": ""})
    assert not inspect_data([{"text": "t", "label": "a"}], chatml_tokenizer, left_out).warnings
    assert "without the column Sentiment: if it is their label, set columns label=Senti" in warning
