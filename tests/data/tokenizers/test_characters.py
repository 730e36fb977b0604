"""Characters to tokens and back, and what becomes of unknown ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.data.tokenizers.characters import FIXED_CHARACTERS, UNKNOWN, CharTokenizer, read_text_file
from lora.errors import DataError


def test_the_fixed_vocabulary_is_printable_ascii_with_newline_tab_and_unknown() -> None:
    tokenizer = CharTokenizer()
    assert tokenizer.vocab_size == 2 + 95 + 1
    assert set("\n\t ~") <= set(tokenizer.characters)
    assert tokenizer.characters.count(UNKNOWN) == 1


@given(st.text(alphabet=FIXED_CHARACTERS))
def test_known_text_comes_back(text: str) -> None:
    tokenizer = CharTokenizer()
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


def test_unknown_characters_become_one_symbol_and_are_counted() -> None:
    tokenizer = CharTokenizer()
    assert tokenizer.decode(tokenizer.encode("aéb😀").tolist()) == f"a{UNKNOWN}b{UNKNOWN}"
    assert tokenizer.count_unknown("ééa😀") == {"é": 2, "😀": 1}
    assert tokenizer.check("plain", "text") == ""
    line = tokenizer.check("é" + "a" * 999, "the text")
    assert "1 of 1,000 characters (0.10%)" in line
    assert "'é' ×1" in line


def test_more_than_one_per_cent_unknown_is_refused_with_the_characters() -> None:
    with pytest.raises(DataError, match=r"2\.00%.*'é' ×2.*Allowed: 1%.*Train a base"):
        CharTokenizer().check("éé" + "a" * 98, "the text")


def test_a_vocabulary_of_a_text_is_its_characters_and_refuses_others() -> None:
    tokenizer = CharTokenizer.from_text("hello")
    assert tokenizer.characters == "ehlo"
    with pytest.raises(DataError, match="'x' ×1"):
        tokenizer.encode("hex")


@pytest.mark.parametrize(("text", "seen"), [("", "is empty"), ("aaa", "only the character 'a'")])
def test_a_text_without_words_makes_no_vocabulary(text: str, seen: str) -> None:
    with pytest.raises(DataError, match=seen):
        CharTokenizer.from_text(text)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "vocab.json"
    CharTokenizer.from_text("añb\n").save(path)
    assert CharTokenizer.load(path).characters == "\nabñ"


@pytest.mark.parametrize("content", ["", "[]", '{"characters": 3}', '{"characters": "aa"}', "{"])
def test_a_damaged_vocabulary_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "vocab.json"
    path.write_text(content)
    with pytest.raises(DataError):
        CharTokenizer.load(path)


def test_a_missing_vocabulary_and_a_missing_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Cannot read .*vocab\.json"):
        CharTokenizer.load(tmp_path / "vocab.json")
    (tmp_path / "plays.txt").write_text("x")
    with pytest.raises(DataError, match=r"does not exist.*Did you mean 'plays\.txt'"):
        read_text_file(tmp_path / "play.txt")


def test_text_files_are_read_as_utf8_with_plain_newlines(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_text_file(path) == "one\ntwo"
    path.write_bytes(b"ab\xff")
    with pytest.raises(DataError, match=r"not UTF-8: byte 2 is 0xff"):
        read_text_file(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        read_text_file(path)
    with pytest.raises(DataError, match="is a folder"):
        read_text_file(tmp_path)
