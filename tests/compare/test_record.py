"""What a comparison found: ratios, the best rate, the table, and the file read again."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest

from lora.compare.record import (
    Comparison,
    Forgetting,
    Member,
    RateChoice,
    RateTrial,
    Sample,
    TaskMetric,
    best_rate,
    edge_note,
    ratios,
    read_comparison,
)
from lora.compare.table import describe_ratios, print_comparison
from lora.errors import CheckpointError
from lora.runs.directory import Run

LORA = Member(
    name="lora", method="lora", folder="members/lora", learning_rate=1e-3, rate_chosen="sweep",
    rates_tried=(RateTrial(1e-3, 0.5), RateTrial(1e-2, None)), steps=100, train_s=10.0,
    step_s_median=0.1,
    peak_memory_bytes=4_000_000_000, planned_memory_bytes=3_900_000_000, trainable_parameters=100,
    total_parameters=1100, stored_bytes=400, final_eval_loss=1.25, best_eval_loss=1.2,
    forgetting=Forgetting("prose", 2.0, 2.1), task_metric=TaskMetric("JSON fields", 0.0, 0.9),
    samples=(Sample("how many?", None, "three\x1b[31m"),),
)  # fmt: skip
FULL = replace(
    LORA, name="full", method="full", folder="members/full", learning_rate=1e-4, train_s=30.0,
    step_s_median=0.25, peak_memory_bytes=10_000_000_000, trainable_parameters=1000,
    total_parameters=1000, stored_bytes=4000, final_eval_loss=1.15, planned_memory_bytes=None,
)  # fmt: skip
FOUND = Comparison("tiny", (LORA, FULL), "steps", 7, 2.0, (Sample("how many?", None, "?"),))


def test_ratios_are_lora_against_the_others() -> None:
    (found,) = ratios(FOUND)
    assert found.against == "full"
    assert found.step_speed == pytest.approx(2.5)
    assert found.total_speed == pytest.approx(3.0)
    assert found.memory_saved == pytest.approx(0.6)
    assert found.stored_fraction == pytest.approx(0.1)
    assert found.trainable_fraction == pytest.approx(0.1)
    assert found.loss_difference == pytest.approx(0.1)
    told = describe_ratios(found)
    assert "2.50 times as fast" in told
    assert "60% less memory" in told
    assert "0.1000 higher" in told
    assert "lower" not in told


def test_the_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    FOUND.write(Run(tmp_path))
    assert read_comparison(tmp_path) == FOUND
    (tmp_path / "compare.json").write_text('{"kind": "compare"}')
    with pytest.raises(CheckpointError, match="members"):
        read_comparison(tmp_path)
    (tmp_path / "compare.json").write_text('{"kind": "sweep"}')
    with pytest.raises(CheckpointError, match="no comparison"):
        read_comparison(tmp_path)


def test_the_best_rate_is_the_lowest_of_equal_ones_and_never_one_that_failed() -> None:
    assert best_rate([RateTrial(1e-2, 0.5), RateTrial(1e-3, 0.5), RateTrial(1e-1, None)]) == 1e-3
    assert best_rate([RateTrial(1e-2, None)]) is None


def test_a_best_rate_at_the_edge_is_told() -> None:
    tried = (RateTrial(1e-4, 2.0), RateTrial(1e-3, 1.0), RateTrial(1e-2, 3.0))
    assert edge_note("lora", RateChoice(1e-3, "sweep", tried)) is None
    assert "highest" in str(edge_note("lora", RateChoice(1e-2, "sweep", tried)))
    assert "lowest" in str(edge_note("full", RateChoice(1e-4, "sweep", tried)))
    assert edge_note("full", RateChoice(1e-4, "default")) is None


def test_the_table_says_it_all_and_steers_no_terminal() -> None:
    from rich.console import Console

    out = io.StringIO()
    print_comparison(FOUND, Console(file=out, width=120))
    shown = out.getvalue()
    wanted = (
        "best of 2 tried",
        "100 (9.09%)",
        "10.00 GB",
        "3.90 GB",
        "JSON fields",
        "0.0% → 90.0%",
    )
    assert [word for word in wanted if word not in shown] == []
    assert "\x1b" not in shown
