"""BLEU and ROUGE-L, beside values computed by hand; a missing package says how to install it."""

from __future__ import annotations

import sys

import pytest

from lora.errors import DependencyError
from lora.inference.scoring.overlap import (
    check_overlap_packages,
    corpus_bleu,
    rouge_l,
    sentence_bleu,
)


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    pytest.importorskip("rouge_score")
    # "the cat on mat": 4 words in common, of 6 expected and of 5 answered
    found = rouge_l(["The cat lay on mat."], ["the cat sat on the mat"])
    precision, recall = 4 / 5, 4 / 6
    assert found == [pytest.approx(2 * precision * recall / (precision + recall))]


def test_rouge_l_knows_words_of_other_scripts() -> None:
    pytest.importorskip("rouge_score")
    assert rouge_l(["кошка спит"], ["кошка спит"]) == [1]
    assert rouge_l(["猫在睡觉"], ["猫不睡觉"]) == [pytest.approx(3 / 4)]


def test_bleu_of_equal_texts_is_a_hundred() -> None:
    pytest.importorskip("sacrebleu")
    sentence = "four words are enough here"
    assert corpus_bleu([sentence], [sentence]) == pytest.approx(100)
    assert sentence_bleu([sentence, "no"], [sentence, sentence])[0] == pytest.approx(100)


@pytest.mark.parametrize(
    ("metric", "module", "name"),
    [("bleu", "sacrebleu", "BLEU"), ("rouge-l", "rouge_score.rouge_scorer", "ROUGE-L")],
)
def test_a_missing_package_is_told_with_its_install_line(
    metric: str, module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DependencyError, match=rf"compute {name}: .*'lora-lm\[eval\]'"):
        check_overlap_packages([metric])
