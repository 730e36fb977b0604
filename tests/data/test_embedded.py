"""The built-in texts: there, large enough, the same every time, held-out apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lora.data.characters import CharTokenizer
from lora.data.embedded import Corpus, code, corpus_from_file, prose


@pytest.mark.parametrize("corpus", [prose, code])
def test_a_corpus_is_large_the_same_each_time_and_nearly_all_known(
    corpus: Callable[[], Corpus],
) -> None:
    first, second = corpus(), corpus()
    assert first == second
    assert len(first.train) > 300_000
    assert len(first.held_out) > 20_000
    CharTokenizer().check(first.train + first.held_out, first.described)  # raises above 1 %


@pytest.mark.parametrize("corpus", [prose, code])
def test_the_held_out_part_is_not_in_the_training_part(corpus: Callable[[], Corpus]) -> None:
    text = corpus()
    middle = len(text.held_out) // 2
    assert text.held_out[middle : middle + 300] not in text.train


def test_a_file_is_split_at_nine_tenths(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a" * 90 + "b" * 10)
    corpus = corpus_from_file(path)
    assert (corpus.train, corpus.held_out) == ("a" * 90, "b" * 10)
    assert str(path) in corpus.described
