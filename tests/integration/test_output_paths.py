"""No command replaces what it reads, the base that only an adapter names among it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lora.cli import main

Contents = dict[str, bytes]


@pytest.fixture(scope="module")
def trained(
    tiny_folder: Path, orders_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A base, and the directory of a run on it."""
    out = tmp_path_factory.mktemp("trained")
    base = shutil.copytree(tiny_folder, out / "base")
    words = ["finetune", str(orders_file), "--model", str(base), "--steps", "2", "--name", "run"]
    words += ["--batch-size", "2", "--max-length", "128", "--samples", "0", "--no-report"]
    assert main([*words, "--out", str(out)]) == 0
    return base, out / "run"


def contents(folder: Path) -> Contents:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", ["", "@best", "/adapter"])
def test_a_merge_never_replaces_the_base_that_the_adapter_names(
    trained: tuple[Path, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = trained
    before = contents(base)
    assert main(["merge", f"{run}{name}", str(base), "--overwrite"]) == 2
    assert "is read by this command" in capsys.readouterr().err
    assert contents(base) == before


def test_other_outputs_never_replace_it_either(
    trained: tuple[Path, Path], orders_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = trained
    before = contents(base)
    weights = str(base / "model.safetensors")
    for words in (
        ["export", weights, "--adapter", str(run)],
        ["eval", str(orders_file), "--adapter", str(run), "--predictions", weights],
        ["checkpoint", f"{run}@best", "--out", str(base)],
    ):
        assert main([*words, "--overwrite"]) == 2
        assert "is read by this command" in capsys.readouterr().err
        assert contents(base) == before


def test_a_checkpoint_replaces_an_adapter_and_never_a_model(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = trained
    other = shutil.copytree(base, tmp_path / "other")
    before = contents(other)
    words = ["checkpoint", f"{run}@best", "--overwrite", "--out"]
    assert main([*words, str(other)]) == 2
    assert "config.json, model.safetensors, which this command does not write" in (
        capsys.readouterr().err
    )
    assert contents(other) == before
    for _ in range(2):
        assert main([*words, str(tmp_path / "adapter")]) == 0
