"""A resumed run is the same run, or the differences are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora.errors import CheckpointError
from lora.runs.same_run import check_same_run

FORMER: dict[str, Any] = {
    "base_fingerprint": "aa",
    "learning_rate": 1e-3,
    "lora": {"rank": 8, "targets": ["q_proj"]},
    "train": {"steps": 10, "micro_batches": 1, "batch_size": 8},
    "data": {"source": "a.jsonl", "fingerprint": "dd"},
    "run": {"eval_every_steps": 5},
}


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"steps": 20, "micro_batches": 2, "batch_size": 8}},
        {"data": {"source": "moved.jsonl", "fingerprint": "dd"}},
        {"run": {"eval_every_steps": 2}},
        {"lora": {"rank": 8, "targets": ("q_proj",)}},
    ],
)
def test_what_may_change(change: dict[str, Any]) -> None:
    check_same_run(FORMER, FORMER | change, Path("run"))


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"lora": {"rank": 4, "targets": ["q_proj"]}}, r"lora\.rank: 8 then, 4 now"),
        ({"lora": None}, r"lora\.rank: 8 then, not given now"),
        ({"data": {"fingerprint": "ee"}}, r"data\.fingerprint: dd then, ee now"),
        ({"base_fingerprint": "bb"}, "base_fingerprint: aa then, bb now"),
        ({"learning_rate": 1e-4}, "learning_rate"),
        ({"train": {"steps": 5, "micro_batches": 1, "batch_size": 8}}, "10 then, 5 now: fewer"),
    ],
)
def test_what_makes_it_another_run_is_shown(change: dict[str, Any], seen: str) -> None:
    with pytest.raises(CheckpointError, match=rf"(?s){seen}.*Allowed are: more steps"):
        check_same_run(FORMER, FORMER | change, Path("run"))
