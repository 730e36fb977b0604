"""A setting that cannot apply is refused by name, unless a run that had it is resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lora
from lora.errors import ConfigError
from lora.finetune.from_settings import build_job
from lora.finetune.unused import check_patience, check_unused


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"eval_data": Path("b.jsonl"), "eval_fraction": 0.2}, "eval_fraction"),
        ({"eval_data": Path("b.jsonl"), "max_eval_examples": 3}, "max_eval_examples"),
        ({"whole_rate_fraction": 0.1}, "whole_rate_fraction"),
        ({"full": True, "whole_rate_fraction": 0.1}, "whole_rate_fraction"),
        ({"schedule": "constant", "min_rate_fraction": 0.2}, "min_rate_fraction"),
    ],
)
def test_it_is_refused_by_name(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.*\nLeave them out"):
        build_job(Path("a.jsonl"), settings)
    job = build_job(Path("a.jsonl"), {**settings, "resume": True})
    with pytest.raises(ConfigError, match=f"{name}=.*\nLeave them out"):
        lora.finetune(replace(job, resume=False))  # a whole job is checked as settings are


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_data": Path("b.jsonl"), "eval_fraction": 0},
        {"modules_to_save": ("lm_head",), "whole_rate_fraction": 0.1},
        {"special_tokens": ("<a>",), "whole_rate_fraction": 0.1},
        {"from_adapter": Path("adapter"), "whole_rate_fraction": 0.1},
        {"schedule": "linear", "min_rate_fraction": 0.2},
    ],
)
def test_what_can_apply_is_taken(settings: dict[str, Any]) -> None:
    build_job(Path("a.jsonl"), settings)


def test_early_stopping_needs_a_validation_loss() -> None:
    job = build_job(Path("a.jsonl"), {"patience": 3})
    with pytest.raises(ConfigError, match=r"patience=3.*no validation data"):
        check_patience(job.run, resume=False, has_validation=False)
    check_patience(job.run, resume=False, has_validation=True)
    check_patience(job.run, resume=True, has_validation=False)


def test_all_of_them_are_named_at_once() -> None:
    settings = {"schedule": "constant", "min_rate_fraction": 0.2, "whole_rate_fraction": 0.1}
    with pytest.raises(ConfigError, match=r"(?s)whole_rate_fraction.*min_rate_fraction"):
        check_unused(build_job(Path("a.jsonl"), settings))
