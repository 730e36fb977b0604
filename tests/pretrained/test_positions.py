"""Sequences beyond a model's positions are named with both numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora.pretrained.positions import why_beyond_positions


@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions"])
def test_both_numbers_are_told(tmp_path: Path, key: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({key: 2048}), encoding="utf-8")
    assert why_beyond_positions(tmp_path, 2048) is None
    told = why_beyond_positions(tmp_path, 4000) or ""
    assert "4,000 tokens" in told
    assert "2,048 positions" in told


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"n_positions": "many"}'])
def test_a_config_that_does_not_say_is_reported_elsewhere(tmp_path: Path, text: str) -> None:
    assert why_beyond_positions(tmp_path, 9) is None
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert why_beyond_positions(tmp_path, 9) is None
