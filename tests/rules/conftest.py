"""What the rules look at: the repository's files and the syntax trees of its modules."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

Trees = dict[str, ast.Module]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's top folder."""
    return Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tracked(root: Path) -> list[Path]:
    """Every file that git keeps or would keep. Skips outside of a git checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("these are rules for a git checkout")
    return sorted(root / name for name in done.stdout.split("\0") if (root / name).is_file())


@pytest.fixture(scope="session")
def trees(root: Path, tracked: list[Path]) -> Trees:
    """By path inside the repository: the syntax tree of each Python file."""
    return {
        path.relative_to(root).as_posix(): ast.parse(path.read_text(encoding="utf-8"), str(path))
        for path in tracked
        if path.suffix == ".py"
    }


@pytest.fixture(scope="session")
def product(trees: Trees) -> Trees:
    """The part of `trees` that people run: without tests and benchmarks."""
    return {
        path: tree
        for path, tree in trees.items()
        if not path.startswith(("tests/", "benchmarks/", "docs/"))
    }
