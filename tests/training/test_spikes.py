"""What counts as a leap of the loss."""

from __future__ import annotations

import math

import pytest

from lora.training.trainer import is_spike

CALM = [2.0, 2.1, 1.9, 2.0, 2.05, 1.95, 2.0, 2.1]


@pytest.mark.parametrize(
    ("loss", "recent", "expected"),
    [
        (8.7, CALM, True),
        (2.4, CALM, False),
        (8.7, CALM[:7], False),  # too early to know
        (0.1, CALM, False),  # a fall is no leap
        (math.nan, CALM, False),
        (3.1, [2.0] * 8, True),
        (2.9, [2.0] * 8, False),
        (6.0, [1.0, 3.0] * 8, False),  # it always goes up and down like this
    ],
)
def test_a_leap(loss: float, recent: list[float], expected: bool) -> None:
    assert is_spike(loss, recent) is expected
