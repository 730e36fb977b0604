"""The choice of a learning rate from its trials, and whether members can be compared."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora.compare.results import (
    BaseResult,
    ModelEvaluation,
    RateChoice,
    best_learning_rate,
    check_same_data,
    edge_note,
    start_loss_notes,
)
from lora.errors import CheckpointError
from lora.runs.comparison_record import Member, RateTrial

LORA = Member(
    name="lora", method="lora", folder="members/lora", learning_rate=1e-3, rate_chosen="default",
    rates_tried=(), steps=2, train_s=1.0, step_s_median=0.5, peak_memory_bytes=9,
    planned_memory_bytes=None, trainable_parameters=1, total_parameters=2, stored_bytes=4,
    final_eval_loss=1.0, best_eval_loss=1.0,
)  # fmt: skip
FULL = replace(LORA, name="full", method="full", folder="members/full")


def write_run(
    folder: Path,
    member: Member,
    *,
    fingerprint: str = "a",
    tokens: tuple[int, ...] = (10, 20),
    skipped_at: int | None = None,
    start_loss: float = 2.0,
) -> None:
    """Write a member's run directory with an evaluation at the start, then a row a step."""
    own = folder / member.folder
    own.mkdir(parents=True)
    (own / "run.json").write_text(
        json.dumps({"method": "lora", "data": {"fingerprint": fingerprint}})
    )
    rows: list[dict[str, float]] = [{"step": 0, "eval_loss": start_loss}]
    rows += [{"step": step, "tokens": n} for step, n in enumerate(tokens, start=1)]
    if skipped_at is not None:
        rows.append({"step": skipped_at, "skipped": 1})
    (own / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_best_rate_is_the_lowest_of_equal_ones_and_never_one_that_failed() -> None:
    trials = [RateTrial(1e-2, 0.5), RateTrial(1e-3, 0.5), RateTrial(1e-1, None)]
    assert best_learning_rate(trials) == 1e-3
    assert best_learning_rate([RateTrial(1e-2, None)]) is None


def test_a_loss_that_is_not_finite_is_a_trial_that_failed() -> None:
    assert best_learning_rate([RateTrial(1.0, math.nan), RateTrial(1e-3, 0.5)]) == 1e-3
    assert best_learning_rate([RateTrial(1.0, math.inf)]) is None


def test_a_best_rate_at_the_edge_is_noted() -> None:
    trials = (RateTrial(1e-4, 2.0), RateTrial(1e-3, 1.0), RateTrial(1e-2, 3.0))
    assert edge_note("lora", RateChoice(1e-3, "sweep", trials)) is None
    assert "highest" in str(edge_note("lora", RateChoice(1e-2, "sweep", trials)))
    assert "lowest" in str(edge_note("full", RateChoice(1e-4, "sweep", trials)))
    assert edge_note("full", RateChoice(1e-4, "default")) is None


def test_members_of_the_same_data_are_compared(tmp_path: Path) -> None:
    write_run(tmp_path, LORA, tokens=(10, 20, 35))
    write_run(tmp_path, FULL, tokens=(10, 20))  # with fewer steps of the same
    check_same_data(tmp_path, [LORA, FULL])


def test_the_tokens_of_a_skipped_step_make_no_other_data(tmp_path: Path) -> None:
    write_run(tmp_path, LORA, tokens=(10, 20, 35))
    write_run(tmp_path, FULL, tokens=(10, 10, 25), skipped_at=2)
    check_same_data(tmp_path, [LORA, FULL])


@pytest.mark.parametrize("other", [{"fingerprint": "b"}, {"tokens": (10, 21)}])
def test_members_of_other_data_are_refused(other: dict[str, Any], tmp_path: Path) -> None:
    write_run(tmp_path, LORA)
    write_run(tmp_path, FULL, **other)
    with pytest.raises(CheckpointError, match=r"lora and full.*same sequences in the same order"):
        check_same_data(tmp_path, [LORA, FULL])


def test_a_member_that_starts_at_another_loss_is_noted(tmp_path: Path) -> None:
    base = BaseResult("tiny", "cpu", 2.0, ModelEvaluation())
    write_run(tmp_path, LORA, start_loss=2.01)
    write_run(tmp_path, FULL, start_loss=2.1)
    (note,) = start_loss_notes(tmp_path, [LORA, FULL], base)
    assert "full fine-tuning starts at a validation loss of 2.1000" in note
