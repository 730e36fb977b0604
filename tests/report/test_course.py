"""The pictures of learning rate and gradient norm."""

from __future__ import annotations

import numpy as np

from lora.report.course import MAX_POINTS, course_pictures
from lora.report.records.records import Point, Report, RunSummary, StepState


def test_a_rise_between_two_drawn_steps_is_seen() -> None:
    n_steps = 10 * MAX_POINTS
    steps = [StepState(n, 1e-4, 1.0) for n in range(1, n_steps + 1)]
    steps[2005:2008] = [StepState(n, 1e-4, 500.0) for n in range(2006, 2009)]
    run = RunSummary(
        name="one", label="one", folder="one", course=tuple(steps), held_out=(Point(1, 2.0),)
    )
    picture = next(p for p in course_pictures(Report("one", (run,))) if p.name == "gradient_norm")
    line = picture.draw().axes[0].get_lines()[0]
    points = np.asarray(line.get_xydata())  # (points, 2)
    assert points[:, 1].max() > 5
    assert len(points) <= MAX_POINTS + 1
