"""Successive halving: which candidates train next, and which are stopped."""

from __future__ import annotations

import pytest

from lora.runs.sweep_record import CandidateState, SweepRecord
from lora.sweep.halving import find_rungs, halve_reached_rungs, next_group

RUNGS = (3, 6, 12)


def make_record(losses: list[float | None], at_once: int = 4) -> SweepRecord:
    candidates = [CandidateState(f"{n:03d}", {}, eval_loss=x) for n, x in enumerate(losses)]
    return SweepRecord(candidates, RUNGS, at_once)


def train(record: SweepRecord, group: tuple[list[int], int] | None) -> None:
    """Do what a wave does to the record."""
    assert group is not None
    numbers, until = group
    for n in numbers:
        record.candidates[n].step = until
        record.candidates[n].status = "done" if until == record.rungs[-1] else "waiting"


def statuses(record: SweepRecord) -> list[str]:
    return [candidate.status for candidate in record.candidates]


@pytest.mark.parametrize(
    ("steps", "halving", "rungs"),
    [(12, True, (3, 6, 12)), (12, False, (12,)), (2, True, (1, 2)), (1, True, (1,))],
)
def test_rungs(steps: int, halving: bool, rungs: tuple[int, ...]) -> None:
    assert find_rungs(steps, halving=halving) == rungs


def test_candidates_train_in_groups_and_the_worse_half_stops_at_each_rung() -> None:
    record = make_record([0.4, 0.1, 0.3, 0.2, 0.5], at_once=3)
    assert next_group(record) == ([0, 1, 2], 3)
    train(record, next_group(record))
    assert halve_reached_rungs(record) == []  # two have not come to the rung
    assert next_group(record) == ([3, 4], 3)
    train(record, next_group(record))
    stopped = halve_reached_rungs(record)
    assert [c.name for c in stopped] == ["000", "004"]
    assert [c.stopped_at for c in stopped] == [3, 3]
    assert stopped[1].reason == "halving at step 3: place 5 of 5"
    assert next_group(record) == ([1, 2, 3], 6)
    train(record, next_group(record))
    assert [c.name for c in halve_reached_rungs(record)] == ["002"]
    assert next_group(record) == ([1, 3], 12)
    train(record, next_group(record))
    assert halve_reached_rungs(record) == []
    assert next_group(record) is None
    assert statuses(record) == ["stopped", "done", "stopped", "done", "stopped"]


def test_a_rung_is_halved_once_even_if_the_sweep_stops_right_after() -> None:
    record = make_record([0.1, 0.2, 0.3, 0.4])
    train(record, next_group(record))
    assert len(halve_reached_rungs(record)) == 2
    assert halve_reached_rungs(record) == []  # the two that are left stand at the rung still
    assert statuses(record).count("stopped") == 2


def test_a_rung_is_not_halved_after_candidates_have_gone_on() -> None:
    record = make_record([0.1, 0.2, 0.3], at_once=1)
    for candidate in record.candidates:
        candidate.step = 3
    record.candidates[0].step = 6
    assert halve_reached_rungs(record) == []


def test_words_of_a_reason_decide_nothing() -> None:
    record = make_record([0.1, 0.2, 0.3, 0.4])
    train(record, next_group(record))
    record.candidates[3].fail("halving at step 3: as a user might name a run")
    assert [c.name for c in halve_reached_rungs(record)] == ["002"]


def test_failed_candidates_take_no_place_and_missing_losses_rank_last() -> None:
    record = make_record([None, 0.2, 0.3, 0.4])
    record.candidates[1].fail("the loss is nan")
    train(record, next_group(record))
    assert [c.name for c in halve_reached_rungs(record)] == ["000"]


def test_only_candidates_at_the_same_step_share_a_wave() -> None:
    record = make_record([0.1] * 4)
    for n, step in enumerate((2, 0, 2, 0)):  # as a split wave leaves them
        record.candidates[n].step = step
    assert next_group(record) == ([0, 2], 3)
