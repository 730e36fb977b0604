"""A resumed run is the same run, or the differences are shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora.errors import CheckpointError
from lora.runs.record import DataRecord, RunRecord
from lora.runs.same_run import check_same_run

FORMER = RunRecord(
    base_fingerprint="aa",
    learning_rate=1e-3,
    lora={"rank": 8, "targets": ["q_proj"]},
    train={"steps": 10, "gradient_accumulation": 1, "batch_size": 8},
    data=DataRecord(source="a.jsonl", fingerprint="dd"),
    run={"eval_every_steps": 5},
)


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"steps": 20, "gradient_accumulation": 2, "batch_size": 8}},
        {"data": DataRecord(source="moved.jsonl", fingerprint="dd")},
        {"run": {"eval_every_steps": 2}},
        {"data_config": {"a_later_flag": False, "a_later_file": None}},
        {"lora": {"rank": 8, "targets": ("q_proj",)}},
    ],
)
def test_what_may_change(change: dict[str, Any]) -> None:
    check_same_run(FORMER, replace(FORMER, **change), Path("run"))


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"lora": {"rank": 4, "targets": ["q_proj"]}}, r"lora\.rank: 8 then, 4 now"),
        ({"lora": None}, r"lora\.rank: 8 then, not set now"),
        ({"data": DataRecord(fingerprint="ee")}, r"data\.fingerprint: dd then, ee now"),
        ({"data_config": {"a_later_flag": True}}, r"data_config\.a_later_flag: not set then, True"),
        ({"base_fingerprint": "bb"}, "base_fingerprint: aa then, bb now"),
        ({"learning_rate": 1e-4}, "learning_rate"),
        (
            {"train": {"steps": 5, "gradient_accumulation": 1, "batch_size": 8}},
            "10 then, 5 now: fewer",
        ),
    ],
)
def test_what_makes_it_another_run_is_shown(change: dict[str, Any], seen: str) -> None:
    with pytest.raises(CheckpointError, match=rf"(?s){seen}.*Allowed to change: more steps"):
        check_same_run(FORMER, replace(FORMER, **change), Path("run"))


def test_an_adapter_is_the_same_by_its_content_not_by_its_path() -> None:
    former = replace(FORMER, from_adapter="a", from_adapter_fingerprint="ff")
    check_same_run(former, replace(former, from_adapter="moved/a"), Path("run"))
    with pytest.raises(CheckpointError, match="from_adapter_fingerprint: ff then, ee now"):
        check_same_run(former, replace(former, from_adapter_fingerprint="ee"), Path("run"))
    older = replace(FORMER, from_adapter="a")
    with pytest.raises(CheckpointError, match="from_adapter: a then, b now"):
        check_same_run(older, replace(former, from_adapter="b"), Path("run"))
    template = {"chat_template": "here/x.jinja"}
    moved = {"chat_template": "/there/x.jinja"}
    check_same_run(
        replace(FORMER, data_config=template), replace(FORMER, data_config=moved), Path("run")
    )


def test_a_run_of_an_older_version_was_native() -> None:
    check_same_run(FORMER, replace(FORMER, implementation="native"), Path("run"))
    with pytest.raises(CheckpointError, match="implementation: native then, transformers now"):
        check_same_run(FORMER, replace(FORMER, implementation="transformers"), Path("run"))


def test_settings_of_reading_may_be_written_otherwise() -> None:
    """The data's fingerprint tells whether they give the same examples."""
    before = replace(FORMER, data_config={"max_length": 64})
    settings = {"columns": {"label": ""}, "raw": True, "template": "{a}{b}", "system": "s"}
    now = replace(FORMER, data_config={"max_length": 64, **settings})
    check_same_run(before, now, Path("run"))
    check_same_run(now, before, Path("run"))
