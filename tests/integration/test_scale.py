"""Files of `lora scale` start real runs: on one machine, and on two that share no directory."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from lora import cli

pytestmark = pytest.mark.slow
FLAGS = "--device cpu --batch-size 6 --max-length 128 --samples 0 --rank 4 --eval-every-steps 6"
TASK = ["--save-every-steps", "3", "--no-report", "--name", "two words", "--to", "torchrun"]
STEPS = 60


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), **more}


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def write(folder: Path, model: Path, data: Path, *words: str) -> Path:
    """Call `lora scale` in a new directory that holds the data; return the script."""
    folder.mkdir()
    (folder / "orders.jsonl").write_bytes(data.read_bytes())
    here = Path.cwd()
    os.chdir(folder)
    try:
        given = ["orders.jsonl", "--model", str(model), *FLAGS.split(), *TASK, *words]
        assert cli.main(["scale", *given]) == 0
    finally:
        os.chdir(here)
    return folder / "two-words.torchrun.sh"


def test_a_script_trains_and_continues(
    tiny_folder: Path, orders_file: Path, tmp_path: Path
) -> None:
    words = ("--devices", "2", "--steps", "6")
    script = write(tmp_path / "one", tiny_folder, orders_file, *words)
    env = environment()
    for steps in ("6", "9"):
        script.write_text(script.read_text().replace("--steps 6", f"--steps {steps}"))
        subprocess.run(["bash", str(script)], check=True, env=env, timeout=120)
    run = tmp_path / "one" / "runs" / "two words"
    assert json.loads((run / "run.json").read_text())["world_size"] == 2
    assert len(losses(run)) == 9


def test_a_process_that_is_killed_on_one_of_two_machines_costs_no_step(
    tiny_folder: Path, orders_file: Path, tmp_path: Path
) -> None:
    words = ("--nodes", "2", "--devices", "1", "--steps", str(STEPS))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    scripts = [write(tmp_path / name, tiny_folder, orders_file, *words) for name in ("a", "b")]
    env = environment(HEAD="localhost", PORT=port)
    started = [subprocess.Popen(["bash", str(script)], env=env) for script in scripts]
    runs = [tmp_path / name / "runs" / "two words" for name in ("a", "b")]
    while not any((run / "checkpoints" / "step-000003").is_dir() for run in runs):
        assert all(process.poll() is None for process in started)
        time.sleep(0.05)
    writer = 0 if runs[0].is_dir() else 1
    (victim,) = children(started[1 - writer].pid)  # a rank on the machine without the run directory
    began_s = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    assert time.monotonic() - began_s < 100
    assert not runs[1 - writer].exists()
    whole = write(tmp_path / "whole", tiny_folder, orders_file, "--devices", "1", *words[4:])
    subprocess.run(["bash", str(whole)], check=True, env=environment(), timeout=120)
    expected = losses(tmp_path / "whole" / "runs" / "two words")
    assert losses(runs[writer]) == pytest.approx(expected, rel=1e-4)
    # Its machine is rank 0 again if it comes first: they sort by name and then by process.
    for script in scripts:
        text = script.read_text().replace(f"--steps {STEPS}", f"--steps {STEPS + 2}")
        script.write_text(text)
    order = [scripts[writer], scripts[1 - writer]]
    started = [subprocess.Popen(["bash", str(script), "--resume"], env=env) for script in order]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    assert len(losses(runs[writer])) == STEPS + 2


def children(pid: int) -> list[int]:
    """Return the child processes of a process."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]
