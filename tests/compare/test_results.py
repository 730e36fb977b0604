"""The choice of a learning rate from its trials."""

from __future__ import annotations

import math

from lora.compare.results import RateChoice, best_learning_rate, edge_note
from lora.runs.comparison_record import RateTrial


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
