"""The record of a comparison: ratios, and the file written, read again, of other versions."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lora.errors import CheckpointError
from lora.runs.comparison_record import (
    Comparison,
    Forgetting,
    Member,
    RateTrial,
    RunFigures,
    Sample,
    TaskMetric,
    lora_ratios,
    ratios,
    read_comparison,
    write_comparison,
)
from lora.runs.directory import Run
from lora.runs.typed_json import Faults

LORA = Member(
    name="lora", method="lora", folder="members/lora", learning_rate=1e-3, rate_chosen="sweep",
    rates_tried=(RateTrial(1e-3, 0.5), RateTrial(1e-2, None)), steps=100, train_s=10.0,
    step_s_median=0.1, peak_memory_bytes=4_000, planned_memory_bytes=3_900,
    trainable_parameters=100, total_parameters=1100, stored_bytes=400, final_eval_loss=1.25,
    best_eval_loss=1.2, forgetting=Forgetting("prose", 2.0, 2.1),
    task_metric=TaskMetric("JSON fields", 0.0, 0.9),
    samples=(Sample("how many?", None, "three", is_cut=True),),
)  # fmt: skip
FULL = replace(
    LORA, name="full", method="full", folder="members/full", learning_rate=1e-4, train_s=30.0,
    step_s_median=0.25, peak_memory_bytes=10_000, trainable_parameters=1000,
    total_parameters=1000, stored_bytes=4000, final_eval_loss=1.15, planned_memory_bytes=None,
    forgetting=None, task_metric=None,
)  # fmt: skip
COMPARISON = Comparison("tiny", (LORA, FULL), "steps", 7, 2.0, (Sample("how many?", None, "?"),))


def test_ratios_are_lora_against_the_others() -> None:
    (found,) = lora_ratios(COMPARISON)
    assert (found.run, found.against) == ("lora", "full")
    assert found.step_speed == pytest.approx(2.5)
    assert found.total_speed == pytest.approx(3.0)
    assert found.memory_saved == pytest.approx(0.6)
    assert found.stored_fraction == pytest.approx(0.1)
    assert found.trainable_fraction == pytest.approx(0.1)
    assert found.loss_difference == pytest.approx(0.1)


def test_ratios_of_unknown_figures_are_unknown() -> None:
    found = ratios(RunFigures("new", None, None, None, None, None, None), FULL.figures)
    assert set(asdict(found).values()) == {"new", "full", None}
    assert ratios(FULL.figures, replace(FULL.figures, stored_bytes=0)).stored_fraction is None


def test_the_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_comparison(tmp_path) is None
    write_comparison(Run(tmp_path), COMPARISON)
    assert read_comparison(tmp_path) == COMPARISON
    values = json.loads((tmp_path / "compare.json").read_text())
    assert (values["kind"], values["schema_version"]) == ("compare", 1)
    assert values["members"][1]["planned_memory_bytes"] is None


def test_a_file_of_the_version_before_is_read(tmp_path: Path) -> None:
    values = json.loads(json.dumps(asdict(COMPARISON)))
    del values["schema_version"]
    for samples in (values["base_samples"], *(m["samples"] for m in values["members"])):
        for sample in samples:
            del sample["is_cut"], sample["step"]
    (tmp_path / "compare.json").write_text(json.dumps(values))
    found = read_comparison(tmp_path)
    uncut = tuple(replace(sample, is_cut=False) for sample in LORA.samples)
    members = tuple(replace(member, samples=uncut) for member in COMPARISON.members)
    assert found == replace(COMPARISON, members=members)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": 2}, "schema_version 2.*reads up to 1.*newer lora"),
        ({"kind": "sweep"}, "kind is 'sweep', not one of compare"),
        ({"members": [{"name": "lora"}]}, "number 1: method is missing"),
        ({"base_eval_loss": "low"}, "base_eval_loss is 'low', not a number"),
    ],
)
def test_what_is_no_comparison_is_refused_with_the_reason(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (tmp_path / "compare.json").write_text(json.dumps({**asdict(COMPARISON), **change}))
    with pytest.raises(CheckpointError, match=f"(?s)compare.json.*{said}"):
        read_comparison(tmp_path)
    faults: Faults = []
    read_comparison(tmp_path, faults)  # a report gathers them
    assert faults
    (tmp_path / "compare.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"compare.json"):
        read_comparison(tmp_path)
