"""The wheel, installed into a fresh environment and used from another directory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

from lora.errors import LoraError
from lora.pretrained.sources import find_model

ROOT = Path(__file__).parents[2]
PARTS = ("lora", "pyproject.toml", "README.md", "LICENSE")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the checkout stays clean."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, source / name)
    # Offline: with the setuptools that is here.
    flags = ("--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--wheel-dir", str(out))
    subprocess.run([sys.executable, "-m", "pip", "wheel", *flags, str(source)], check=True)
    (built,) = out.glob("lora_lm-*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; what it needs is found in the one that runs the tests."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    flags = ("--no-deps", "--no-index", "--quiet")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", *flags, str(wheel)]
    subprocess.run(pip, check=True)
    # A directory of a .pth file comes after the environment's own, and its .pth files, one of
    # which leads to the checkout, are not read.
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder


def run(
    environment: Path, where: Path, *words: str, program: str = "lora"
) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(environment / "bin" / program), *words],
        cwd=where,
        env=clean,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done


def test_the_metadata_of_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        (path,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = message_from_string(opened.read(path).decode())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lora", "lora_lm"}
    assert metadata["Author"]
    assert metadata.get_all("Project-URL")
    classifiers = metadata.get_all("Classifier")
    assert classifiers is not None
    assert "Typing :: Typed" in classifiers


def test_the_first_hour_from_another_directory(
    environment: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    where = run(environment, tmp_path, "-c", "import lora; print(lora.__file__)", program="python")
    assert Path(where.stdout.strip()).is_relative_to(environment)
    for part, name in (("train", "tickets.csv"), ("test", "test.csv")):
        rows = run(environment, tmp_path, "example", "tickets", "--part", part, "--rows", "24")
        (tmp_path / name).write_text(rows.stdout, encoding="utf-8")
    model = ("--model", str(tiny_folder))
    run(environment, tmp_path, "data", "tickets.csv", *model)
    settings = ("--steps", "4", "--batch-size", "2", "--max-length", "256", "--name", "tickets")
    run(environment, tmp_path, "finetune", "tickets.csv", *model, *settings)
    assert (tmp_path / "runs" / "tickets" / "report.html").is_file()
    adapter = ("--adapter", "runs/tickets/adapter")
    scores = run(environment, tmp_path, "eval", "test.csv", *adapter, "--answers", "2", "--json")
    assert json.loads(scores.stdout).keys() == {"base", "adapter"}
    run(environment, tmp_path, "generate", "Where is my kettle?", *adapter, "--max-new-tokens", "4")
    run(environment, tmp_path, "merge", "runs/tickets/adapter", "merged")
    run(environment, tmp_path, "export", "tickets.gguf", *adapter)
    assert (tmp_path / "merged" / "config.json").is_file()


def test_the_demo_runs_from_the_wheel(environment: Path, tmp_path: Path) -> None:
    try:
        find_model(None)
    except LoraError as error:
        pytest.skip(str(error))
    done = run(environment, tmp_path, "demo", "--steps", "2", "--answers", "2", "--json")
    assert json.loads(done.stdout)["adapted"]["n_answers"] == 2
