"""Sequences beyond a model's positions are named with both numbers."""

from __future__ import annotations

from lora.pretrained.positions import describe_excess


def test_both_numbers_are_told() -> None:
    assert describe_excess(2048, 2048) is None
    told = describe_excess(4000, 2048) or ""
    assert "4,000 tokens" in told
    assert "2,048 positions" in told
