"""Losses that leap out of what came before: said and marked, never acted upon."""

from __future__ import annotations

import math
import statistics

WINDOW_STEPS, MIN_STEPS = 32, 8
FAR_DEVIATIONS, FAR_FRACTION = 6.0, 0.5


def is_spike(loss: float, recent: list[float]) -> bool:
    """Is `loss` far above `recent`: six deviations from their median and half of it more?

    The deviation is the median absolute one, as of a normal distribution; with fewer than
    MIN_STEPS losses nothing is a spike.
    """
    if len(recent) < MIN_STEPS or not math.isfinite(loss):
        return False
    middle = statistics.median(recent)
    deviation = 1.4826 * statistics.median(abs(value - middle) for value in recent)
    return loss - middle > max(FAR_DEVIATIONS * deviation, FAR_FRACTION * abs(middle))
