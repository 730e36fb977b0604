"""docs/reliability.md names tests that exist, and tells of PEFT what was measured."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

Trees = dict[str, ast.Module]


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    """The text of docs/reliability.md."""
    return (root / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_every_test_that_the_page_names_exists(page: str, trees: Trees) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    gone = [
        f"{path}::{name}"
        for path, name in named
        if path not in trees
        or name not in {n.name for n in trees[path].body if isinstance(n, ast.FunctionDef)}
    ]
    assert len(named) > 15
    assert not gone, f"docs/reliability.md names tests that do not exist: {gone}"


def test_every_fault_that_was_measured_is_in_the_table(page: str, root: Path) -> None:
    lines = (root / "benchmarks" / "results" / "faults_peft.jsonl").read_text().splitlines()
    first, *rows = map(json.loads, lines)
    faults = re.findall(r"^\| ([^|]+) \|", page, flags=re.MULTILINE)
    assert {row["fault"] for row in rows} <= {fault.strip() for fault in faults}
    for package in ("peft", "transformers", "accelerate", "torch"):
        version = ".".join(first["versions"][package].split("+")[0].split(".")[:2])
        assert version in page, f"{package} {version} was measured"
