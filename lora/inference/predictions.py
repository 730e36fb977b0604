"""The predictions file of an evaluation: JSONL, one row an answer, with its scores.

{"source": "test.jsonl:3", "turn": 1, "prompt": …, "expected": …, "answer": …,
 "is_cut": false, "scores": {"exact_match": true, …}, "base_answer": …, "base_scores": …}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora.inference.evaluation import Evaluation
from lora.inference.scoring.json_fields import parse_json, right_fields
from lora.inference.scoring.labels import label_finder
from lora.inference.scoring.overlap import rouge_l, sentence_bleu
from lora.runs.typed_json import json_text


def write_predictions(path: Path, evaluation: Evaluation, base: Evaluation | None = None) -> None:
    """Write the answers of an evaluation, and those of the base model to the same prompts."""
    scored = score_each(evaluation)
    base_scored = [] if base is None else score_each(base)
    with path.open("w", encoding="utf-8") as file:
        for number, (answer, scores) in enumerate(zip(evaluation.answers, scored, strict=True)):
            row: dict[str, Any] = {
                "source": answer.source,
                "turn": answer.turn,
                "prompt": answer.prompt,
                "expected": answer.reference,
                "answer": answer.answer,
                "is_cut": answer.is_cut,
                "scores": scores,
            }
            if base is not None:
                row["base_answer"] = base.answers[number].answer
                row["base_scores"] = base_scored[number]
            file.write(json_text(row, ensure_ascii=False) + "\n")


def score_each(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the scores of each answer, by the names of the metrics that were computed."""
    answers = evaluation.answers
    texts = [answer.scored for answer in answers]
    references = [answer.reference for answer in answers]
    scores: list[dict[str, Any]] = [{"exact_match": answer.is_exact} for answer in answers]
    for metric in evaluation.metrics:
        for row, found in zip(scores, _SCORERS[metric](texts, references), strict=True):
            row.update(found)
    return scores


Rows = list[dict[str, Any]]


def _label_rows(texts: Sequence[str], references: Sequence[str]) -> Rows:
    find = label_finder(references)
    pairs = zip(map(find, texts), references, strict=True)
    return [{"label": label, "label_right": label == wanted.strip()} for label, wanted in pairs]


def _field_rows(texts: Sequence[str], references: Sequence[str]) -> Rows:
    return [
        {"valid_json": parse_json(text) is not None, "fields": right_fields(text, reference)}
        for text, reference in zip(texts, references, strict=True)
    ]


_SCORERS: dict[str, Callable[[Sequence[str], Sequence[str]], Rows]] = {
    "exact-match": lambda texts, references: [{} for _ in texts],
    "json-fields": _field_rows,
    "classification": _label_rows,
    "rouge-l": lambda texts, references: [{"rouge_l": x} for x in rouge_l(texts, references)],
    "bleu": lambda texts, references: [{"bleu": x} for x in sentence_bleu(texts, references)],
}
