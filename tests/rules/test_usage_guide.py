"""LORA_USAGE.md lists the variables of training.py as ClassicSettings has them, and no other."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from models.classic_settings import TEST_SIZES, ClassicSettings

HEADING = "## Every variable"
ADVICE = f"Mend the table under `{HEADING}` in LORA_USAGE.md, or models/classic_settings.py."
ROW = re.compile(r"^\| `([A-Z_]+)` \| (.*?) \| (.*) \|$", flags=re.MULTILINE)


@pytest.fixture(scope="module")
def guide(root: Path) -> str:
    """The text of LORA_USAGE.md."""
    path = root / "LORA_USAGE.md"
    assert path.is_file(), "LORA_USAGE.md is missing: it explains the variables of training.py"
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows(guide: str) -> list[tuple[str, str, str]]:
    """The table's rows: variable, default, meaning."""
    assert HEADING in guide, f"LORA_USAGE.md has no heading {HEADING}"
    section = guide.split(HEADING)[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    found = ROW.findall(section)
    assert len(found) == len(lines), f"a row is not `| `NAME` | default | meaning |`. {ADVICE}"
    return found


def written(value: object) -> str:
    """Return a default as the guide writes it."""
    return str(value) if value != "" else "empty"


def meanings(root: Path) -> dict[str, str]:
    """Return, by variable, the text that stands under its field, on one line."""
    tree = ast.parse((root / "models" / "classic_settings.py").read_text(encoding="utf-8"))
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef))
    (owner,) = (node for node in classes if node.name == ClassicSettings.__name__)
    return {
        ast.unparse(field.target).upper(): " ".join(ast.literal_eval(text.value).split())
        for field, text in zip(owner.body, owner.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def test_every_variable_and_no_other_is_in_the_table(rows: list[tuple[str, str, str]]) -> None:
    names = [name for name, _, _ in rows]
    wanted = [field.name.upper() for field in dataclasses.fields(ClassicSettings)]
    missing, extra = sorted(set(wanted) - set(names)), sorted(set(names) - set(wanted))
    assert not missing, f"the table lacks {', '.join(missing)}. {ADVICE}"
    assert not extra, f"training.py reads no {', '.join(extra)}. {ADVICE}"
    assert len(names) == len(set(names)), f"a variable stands twice. {ADVICE}"


def test_every_default_in_the_table_is_the_real_one(rows: list[tuple[str, str, str]]) -> None:
    real = {f.name.upper(): written(f.default) for f in dataclasses.fields(ClassicSettings)}
    faults = [
        f"{name}: the table says {default}, the default is {real[name]}"
        for name, default, _ in rows
        if name in real and default.strip("`") != real[name]
    ]
    assert not faults, "\n".join([*faults, ADVICE])


def test_every_meaning_is_the_text_under_the_field(
    rows: list[tuple[str, str, str]], root: Path
) -> None:
    real = meanings(root)
    assert len(real) == len(dataclasses.fields(ClassicSettings)), "a field has no text under it"
    faults = [
        f"{name}:\n  guide: {meaning}\n  field: {real[name]}"
        for name, _, meaning in rows
        if name in real and meaning != real[name]
    ]
    assert not faults, "\n".join([*faults, ADVICE])


def test_the_sizes_of_test_mode_are_the_real_ones(guide: str) -> None:
    (line,) = re.findall(r"`TEST_MODE=True` only changes .*", guide)
    said = {name.lower(): int(value) for name, value in re.findall(r"`([A-Z_]+)=(\d+)`", line)}
    assert said == TEST_SIZES, f"the line about TEST_MODE says {said}, it sets {TEST_SIZES}"


def test_every_variable_set_in_an_example_exists(guide: str) -> None:
    known = {field.name.upper() for field in dataclasses.fields(ClassicSettings)}
    lines = [line for line in guide.splitlines() if line.endswith("python training.py")]
    unknown = {
        name for line in lines for name in re.findall(r"\b([A-Z_]+)=", line) if name not in known
    }
    assert lines, "LORA_USAGE.md has no example of training.py"
    assert not unknown, f"examples set {', '.join(sorted(unknown))}, which training.py refuses"
