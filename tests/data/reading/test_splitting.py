from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.data.reading.formats import Example, example_from_file, example_from_row
from lora.data.reading.splitting import split_examples
from lora.errors import DataError


def texts(*contents: str) -> list[Example]:
    return [example_from_row({"text": c}, f"f:{n}") for n, c in enumerate(contents, 1)]


@given(
    st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=40),
    st.floats(0.01, 0.99),
    st.integers(1, 10),
    st.integers(0, 3),
)
def test_sides_share_nothing_and_lose_nothing(
    contents: list[str], fraction: float, most: int, seed: int
) -> None:
    examples = texts(*contents)
    if len(set(contents)) < 2:
        with pytest.raises(DataError, match="no two different examples"):
            split_examples(examples, fraction, most, seed)
        return
    train, validation = split_examples(examples, fraction, most, seed)
    assert train
    assert validation
    assert not {e.text for e in train} & {e.text for e in validation}
    assert sorted(e.source for e in train + validation) == sorted(e.source for e in examples)
    assert (train, validation) == split_examples(examples, fraction, most, seed)


def test_the_share_and_the_most_are_kept() -> None:
    examples = texts(*map(str, range(1000)))
    assert len(split_examples(examples, 0.05, 200, 0)[1]) == 50
    assert len(split_examples(examples, 0.5, 200, 0)[1]) == 200
    assert split_examples(examples, 0, 200, 0) == (examples, [])


def test_the_seed_decides_and_the_order_stays() -> None:
    examples = texts(*map(str, range(100)))
    validation = [split_examples(examples, 0.2, 200, seed)[1] for seed in (0, 1)]
    assert validation[0] != validation[1]
    assert validation[0] == sorted(validation[0], key=lambda e: int(e.text or ""))


def test_many_copies_do_not_all_land_in_the_small_side() -> None:
    examples = texts(*["copy"] * 50, "one", "two")
    for seed in range(10):
        validation = split_examples(examples, 0.02, 5, seed)[1]
        assert len(validation) == 1


def test_files_lose_their_ends_between_lines() -> None:
    text = "".join(f"line {n}\n" for n in range(100))
    files = [example_from_file(text, "a.txt"), example_from_file("x" * 10, "b.txt")]
    train, validation = split_examples(files, 0.1, 200, 0)
    assert [e.source for e in train] == ["a.txt", "b.txt"]
    assert (train[0].text or "") + (validation[0].text or "") == text
    assert (validation[0].text or "").startswith("line ")
    assert len(validation[0].text or "") == pytest.approx(len(text) * 0.1, abs=10)
    assert train[1].text == "x" * 10  # too short to be cut


def test_the_validation_end_of_large_files_is_bounded() -> None:
    file = example_from_file("a line of text\n" * 10_000, "a.txt")
    (validation,) = split_examples([file], 0.5, 3, 0)[1]
    assert len(validation.text or "") == pytest.approx(6000, abs=20)


@pytest.mark.parametrize("text", ["word " * 20, "a\n" + "b" * 50, "b" * 50 + "\na"])
def test_texts_of_one_line_are_cut_between_words(text: str) -> None:
    (train,), (validation,) = split_examples([example_from_file(text, "a.txt")], 0.3, 200, 0)
    assert (train.text or "") + (validation.text or "") == text
    assert (train.text or "")[-1].isspace()
    assert not (validation.text or "")[0].isspace()


def test_a_text_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(DataError, match=r"ends of 1 text files .*set eval_fraction to 0"):
        split_examples([example_from_file("word", "a.txt")], 0.1, 200, 0)
