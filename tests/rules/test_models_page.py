"""The table of docs/models.md is what benchmarks/models_table.py finds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.pretrained.tiny_models import ARCHITECTURES, FURTHER

pytest.importorskip("transformers")
pytest.importorskip("peft")

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"
QUICK = ("llama", "gemma2", "gpt_neox", "falcon", "opt", "mixtral", "mamba")

sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    import models_table
finally:
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in models_table.NAMES],
)
def test_a_row_is_what_the_code_does(name: str) -> None:
    row = models_table.make_table([name]).splitlines()[-1]
    assert row in PAGE.read_text(encoding="utf-8").splitlines(), "python benchmarks/models_table.py"


def test_every_tested_architecture_has_a_row() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in ARCHITECTURES | FURTHER:
        assert f"| `{name.partition('-')[0]}` |" in page, name
    made = page[page.index(models_table.START) : page.index(models_table.END)]
    assert made.count("\n| ") == len(models_table.NAMES) + 2
