"""A comparison in the terminal: all figures, and nothing that steers the terminal."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from lora.compare.table import describe_ratios, print_comparison
from lora.runs.comparison_record import (
    Comparison,
    Forgetting,
    Member,
    RateTrial,
    Ratios,
    Sample,
    TaskMetric,
    lora_ratios,
)

LORA = Member(
    name="lora", method="lora", folder="members/lora", learning_rate=1e-3, rate_chosen="sweep",
    rates_tried=(RateTrial(1e-3, 0.5), RateTrial(1e-2, None)), steps=100, train_s=10.0,
    step_s_median=0.1, peak_memory_bytes=4_000_000_000, planned_memory_bytes=3_900_000_000,
    trainable_parameters=100, total_parameters=1100, stored_bytes=400, final_eval_loss=1.25,
    best_eval_loss=1.2, forgetting=Forgetting("prose", 2.0, 2.1),
    task_metric=TaskMetric("JSON fields", 0.0, 0.9),
    samples=(Sample("how many?", None, "three\x1b[31m"),),
)  # fmt: skip
FULL = replace(
    LORA, name="full", method="full", learning_rate=1e-4, train_s=30.0, step_s_median=0.25,
    peak_memory_bytes=10_000_000_000, final_eval_loss=1.15, planned_memory_bytes=None,
)  # fmt: skip
COMPARISON = Comparison("tiny", (LORA, FULL), "steps", 7, 2.0, (Sample("how many?", None, "?"),))


def test_ratios_are_described_in_a_line() -> None:
    (found,) = lora_ratios(COMPARISON)
    described = describe_ratios(found)
    assert "2.50 times as fast per step" in described
    assert "60% less peak memory" in described
    assert "0.1000 higher" in described
    assert "lower" not in described
    unknown = Ratios("lora", "peft", None, None, -0.5, None, None, None)
    assert describe_ratios(unknown) == "LoRA against PEFT: 50% more peak memory"


def test_the_table_has_all_figures_and_no_control_characters() -> None:
    out = io.StringIO()
    print_comparison(COMPARISON, Console(file=out, width=120))
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
