"""Joining the other processes under torchrun itself, whose store outlives every group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import torch
from lora.distributed.start import joined


def main():
    for number in range(3):
        with joined(torch.device("cpu")) as world:
            found = world.gather((world.rank, number), "numbers")
            assert found == [(0, number), (1, number)], found


main()  # a world kept in a global outlives its group, and gloo then aborts now and then at exit
"""


def test_processes_join_again_after_they_have_left(tmp_path: Path) -> None:
    script = tmp_path / "thrice.py"
    script.write_text(SCRIPT)
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, *words], env=environment, timeout=60, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
