"""BLEU and ROUGE-L of answers, by the packages that papers compare with: sacrebleu, rouge-score."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lora.errors import DependencyError
from lora.settings.install import install_extra

# Letters and digits of any script; Chinese and Japanese, which put no spaces between words, by
# character. rouge-score's own tokenizer drops everything but a to z and digits, so that texts in
# other scripts would score 0. On English text both find the same words.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


def check_overlap_packages(metrics: Sequence[str]) -> None:
    """Raise DependencyError if a package that `metrics` (bleu, rouge-l) need is missing."""
    if "bleu" in metrics:
        _sacrebleu()
    if "rouge-l" in metrics:
        _rouge_scorer()


def corpus_bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the corpus BLEU of `answers`, 0 to 100."""
    return float(_sacrebleu().corpus_bleu(list(answers), [list(references)]).score)


def sentence_bleu(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return the BLEU of each answer, 0 to 100; their mean is not the corpus BLEU."""
    bleu = _sacrebleu()
    pairs = zip(answers, references, strict=True)
    return [float(bleu.sentence_bleu(answer, [reference]).score) for answer, reference in pairs]


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return the ROUGE-L F-measure of each answer, 0 to 1, without stemming."""
    scorer = _rouge_scorer()
    pairs = zip(answers, references, strict=True)
    return [
        float(scorer.score(reference, answer)["rougeL"].fmeasure) for answer, reference in pairs
    ]


class _Words:
    """The tokenizer that rouge-score calls."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError:
        raise _missing("BLEU", "sacrebleu") from None
    return sacrebleu


def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise _missing("ROUGE-L", "rouge-score") from None
    return RougeScorer(["rougeL"], use_stemmer=False, tokenizer=_Words())


def _missing(metric: str, package: str) -> DependencyError:
    return DependencyError(
        f"Cannot compute {metric}: {package} is not installed. Run: {install_extra('eval')}"
    )
