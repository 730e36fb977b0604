"""The built-in texts: there, large enough, the same every time, held-out apart."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from lora.data.reading.embedded import Corpus, code, corpus_from_file, prose
from lora.data.tokenizers.characters import CharTokenizer
from lora.errors import DataError


@pytest.mark.parametrize("corpus", [prose, code])
def test_a_corpus_is_large_the_same_each_time_and_nearly_all_known(
    corpus: Callable[[], Corpus],
) -> None:
    first, second = corpus(), corpus()
    assert first == second
    assert len(first.train) > 300_000
    assert len(first.validation) > 20_000
    CharTokenizer().check(first.train + first.validation, first.described)  # raises above 1 %


@pytest.mark.parametrize("corpus", [prose, code])
def test_little_of_the_validation_part_is_in_the_training_part(
    corpus: Callable[[], Corpus],
) -> None:
    parts = corpus()
    # Windows of 60 characters, wherever lines are broken; only idioms and licences repeat.
    train, validation = (" ".join(part.split()) for part in (parts.train, parts.validation))
    windows = {train[i : i + 60] for i in range(len(train) - 60)}
    seen = [validation[i : i + 60] in windows for i in range(0, len(validation) - 60, 7)]
    assert sum(seen) / len(seen) < 0.03


def test_what_describes_the_machine_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "_sysconfigdata_linux.py").write_text("PRIVATE = 1")
    (tmp_path / "sitecustomize.py").write_text("PRIVATE = 1")
    for number in range(10):
        (tmp_path / f"module_{number}.py").write_text(f"X = {number}")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    parts = code()
    assert parts.train == "\n".join(f"X = {number}" for number in range(9))
    assert parts.validation == "X = 9"


def test_a_python_without_its_source_or_prose_is_an_error_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(
        DataError,
        match=r"library's source: .* lacks it\. Give a text file of your own",
    ):
        code()
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"lacks pydoc_data\.topics\. Give a text file of your own"):
        prose()


def test_a_library_that_cannot_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").symlink_to(tmp_path / "gone.py")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match=r"Cannot read .*broken\.py of the standard library"):
        code()


def test_a_file_is_split_at_nine_tenths(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a" * 90 + "b" * 10)
    corpus = corpus_from_file(path)
    assert (corpus.train, corpus.validation) == ("a" * 90, "b" * 10)
    assert str(path) in corpus.described
