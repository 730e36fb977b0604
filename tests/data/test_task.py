"""Every kind of job begins with the same task."""

from __future__ import annotations

import dataclasses

import pytest

from lora.compare.decoder_target import DecoderTarget
from lora.config import DataConfig
from lora.data.task import Task
from lora.finetune.job import FinetuneJob
from lora.sweep.grid import Grid
from lora.sweep.job import SweepJob


def test_jobs_hold_the_tasks_fields() -> None:
    given = {"data": "a.jsonl", "model": "m", "eval_data": "b.jsonl", "data_config": DataConfig(64)}
    given["implementation"] = "native"
    jobs = [FinetuneJob(**given), SweepJob(**given, grid=Grid()), DecoderTarget(**given)]
    for job in jobs:
        assert isinstance(job, Task)
        assert {f.name: getattr(job, f.name) for f in dataclasses.fields(Task)} == given


def test_a_fourth_argument_without_a_name_is_refused() -> None:
    with pytest.raises(TypeError, match="positional"):
        Task("a.jsonl", None, None, DataConfig())  # type: ignore[misc]
