"""Parts of a directory: training, validation and test files are used as such."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora.config import DataConfig
from lora.data.prepare import PreparedData, prepare_data
from lora.data.sources.files import Part, find_files
from lora.data.tokenizers.subword import TextTokenizer
from lora.errors import DataError


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"text": "the dog of {name}"}}\n', encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("names", "train", "validation", "test"),
    [
        (["train.jsonl", "validation.jsonl", "test.jsonl"], "train", "validation", "test"),
        (["orders_train.csv", "orders-dev.csv"], "orders_train", "orders-dev", "orders-dev"),
        (["train/a.jsonl", "valid/b.jsonl", "test/c.jsonl"], "a", "b", "c"),
        (["tickets.csv", "test.csv"], "tickets", "tickets", "test"),
        (["train-00000-of-00002.jsonl", "eval.jsonl"], "train-00000-of-00002", "eval", "eval"),
        (["a.jsonl", "b.jsonl"], "a b", "a b", "a b"),
        (["guide.md", "test-plan.md", "test.md"], "guide test-plan", "guide test-plan", "test"),
    ],
)
def test_names_tell_the_part(
    names: list[str], train: str, validation: str, test: str, tmp_path: Path
) -> None:
    fill(tmp_path, *names)
    expected: dict[Part, str] = {"train": train, "validation": validation, "test": test}
    for part, stems in expected.items():
        assert " ".join(path.stem for path in find_files(tmp_path, part)) == stems


def test_what_stands_for_a_part_is_told(tmp_path: Path) -> None:
    fill(tmp_path, "train.jsonl", "dev.jsonl")
    said: list[str] = []
    find_files(tmp_path, "test", said.append)
    assert said == [f"no test file in {tmp_path}: dev.jsonl stand for it"]


def test_test_data_are_never_trained_on(tmp_path: Path) -> None:
    fill(tmp_path, "test.jsonl", "dev.jsonl")
    with pytest.raises(DataError, match=r"Cannot train on.*validation or test.*dev.jsonl, test.js"):
        find_files(tmp_path)


def prepared(source: Path, tokenizer: TextTokenizer, **settings: float) -> tuple[PreparedData, str]:
    said: list[str] = []
    config = DataConfig(max_length=32, **settings)  # type: ignore[arg-type]
    data = prepare_data(source, tokenizer, config, seed=1, on_message=said.append)
    return data, "\n".join(said)


def test_validation_files_are_for_validation(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    fill(tmp_path, "train.jsonl", "more.jsonl", "validation.jsonl", "test.jsonl")
    data, said = prepared(tmp_path, tokenizer)
    assert [e.text for e in data.train_examples] == [
        "the dog of more.jsonl",
        "the dog of train.jsonl",
    ]
    assert [e.text for e in data.validation_examples] == ["the dog of validation.jsonl"]
    assert "not trained on, as validation data: validation.jsonl" in said
    assert "\nvalidation data: validation.jsonl" in said
    assert "never trained on, as test data: test.jsonl (lora eval takes them)" in said
    assert "not used" not in said
    assert "eval_fraction=0.3 is not used" in prepared(tmp_path, tokenizer, eval_fraction=0.3)[1]
    data, said = prepared(tmp_path, tokenizer, eval_fraction=0)
    assert (len(data.train_examples), data.validation_examples) == (2, [])
    assert "validation data are not used: eval_fraction is 0" in said
    given = prepare_data(
        tmp_path,
        tokenizer,
        DataConfig(max_length=32),
        seed=1,
        validation_source=tmp_path / "more.jsonl",
    )
    assert [e.text for e in given.validation_examples] == ["the dog of more.jsonl"]
