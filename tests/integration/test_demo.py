"""The demo as a user starts it: the real model in two steps, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora.errors import LoraError
from lora.pretrained.sources import find_model

ROOT = Path(__file__).parents[2]


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "demo.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("n_answers", ["0", "1001"])
def test_it_refuses_before_it_loads(n_answers: str) -> None:
    done = run_demo("--answers", n_answers)
    assert done.returncode == 2
    assert f"--answers {n_answers}. Allowed: 1 to 1000" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_steps_of_the_real_model(tmp_path: Path) -> None:
    try:
        find_model(None)
    except LoraError as error:
        pytest.skip(str(error))
    out = tmp_path / "runs"
    done = run_demo("--steps", "2", "--answers", "2", "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["base"]["n_answers"] == figures["adapted"]["n_answers"] == 2
    assert figures["adapted"]["loss"] < figures["base"]["loss"]
    assert figures["peak_memory_bytes"] < 3e9
    (folder,) = out.iterdir()
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert all(json.loads(row["wanted"]).keys() >= {"customer", "city"} for row in answers)
    for name in ("figures.json", "loss.png", "adapter/adapter_model.safetensors"):
        assert (folder / name).stat().st_size > 0
