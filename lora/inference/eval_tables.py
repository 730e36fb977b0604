"""An evaluation as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora.inference.evaluation import Evaluation, Scores
from lora.inference.scoring.labels import Classification

if TYPE_CHECKING:
    from rich.console import Console

MAX_SHOWN_LABELS = 12
"""Of a confusion matrix on a terminal; larger ones are shown as the most frequent mistakes."""
MAX_SHOWN_MISTAKES = 10
NO_LABEL = "(no label)"


def print_evaluations(
    console: Console, evaluations: Mapping[str, Evaluation], n_examples: int
) -> None:
    """Print the scores of the evaluations side by side, and the labels of the last one."""
    from rich.table import Table

    table = Table(title=f"{n_examples} examples", title_justify="left")
    table.add_column("")
    for name in evaluations:
        table.add_column(name, justify="right")
    rows = [_rows(each.scores) for each in evaluations.values()]
    for key in dict.fromkeys(key for row in rows for key in row):
        table.add_row(key, *(row.get(key, "–") for row in rows))
    console.print(table)
    name, last = list(evaluations.items())[-1]
    if last.scores.classification is not None:
        _print_labels(console, last.scores.classification)
        _print_confusion(console, last.scores.classification, name)


def _rows(scores: Scores) -> dict[str, str]:
    """Return the lines of one model: what is scored, and its value."""
    n = scores.n_answers
    found: dict[str, object] = {
        "loss": f"{scores.loss:.4f}",
        "perplexity": f"{scores.perplexity:.4f}",
        "answers": n or None,
        "exact match": _part(scores.exact_match, n),
        "valid JSON": _part(scores.valid_json, n),
        "JSON fields right": _part(scores.fields_right, scores.n_fields or 0),
    }
    for name, accuracy in (scores.field_accuracy or {}).items():
        found[f"  {name}"] = f"{accuracy:.1%}"
    if scores.classification is not None:
        found["accuracy"] = f"{scores.classification.accuracy:.1%}"
        found["macro-F1"] = f"{scores.classification.macro_f1:.3f}"
        found["answers that are no label"] = scores.classification.n_no_label
    found["ROUGE-L"] = None if scores.rouge_l is None else f"{scores.rouge_l:.3f}"
    found["BLEU"] = None if scores.bleu is None else f"{scores.bleu:.1f}"
    found["cut answers"] = scores.n_cut_answers or None
    found["longest sequence, tokens"] = scores.max_length
    found["examples cut for the loss"] = scores.n_cut_examples or None
    found["tokens cut for the loss"] = scores.n_cut_tokens or None
    return {name: str(value) for name, value in found.items() if value is not None}


def _part(count: int | None, total: int) -> str | None:
    return None if count is None else f"{count}/{total} ({count / max(total, 1):.1%})"


def _print_labels(console: Console, found: Classification) -> None:
    from rich.table import Table

    table = Table(title="Labels", title_justify="left")
    table.add_column("label")
    for name in ("precision", "recall", "F1", "references"):
        table.add_column(name, justify="right")
    for label in found.labels:
        numbers = (f"{value:.3f}" for value in (label.precision, label.recall, label.f1))
        table.add_row(label.label, *numbers, str(label.n_references))
    console.print(table)


def _print_confusion(console: Console, found: Classification, name: str) -> None:
    from rich.table import Table

    labels = [label.label for label in found.labels]
    answered = [*labels, NO_LABEL]
    if len(labels) <= MAX_SHOWN_LABELS:
        table = Table(title=f"Confusion matrix, {name}: expected by answered", title_justify="left")
        table.add_column("expected")
        for label in answered:
            table.add_column(label, justify="right")
        for label, row in zip(labels, found.confusion, strict=True):
            table.add_row(label, *map(str, row))
        console.print(table)
        return
    mistakes = sorted(
        (
            (-count, label, answer)
            for label, row in zip(labels, found.confusion, strict=True)
            for answer, count in zip(answered, row, strict=True)
            if count and answer != label
        ),
    )
    table = Table(title=f"Most frequent mistakes, {name}", title_justify="left")
    table.add_column("expected")
    table.add_column("answered")
    table.add_column("answers", justify="right")
    for count, label, answer in mistakes[:MAX_SHOWN_MISTAKES]:
        table.add_row(label, answer, str(-count))
    console.print(table)
