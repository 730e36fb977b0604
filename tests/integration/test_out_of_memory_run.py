"""A real run whose memory runs out: told, and resumed with another setting."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import resource, sys
from pathlib import Path
import torch
from lora.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.errors import TrainingError
from lora.finetune import finetune
from lora.finetune import FinetuneJob
from lora.runs.progress import NoProgress

class Starve(NoProgress):
    hoard = []  # what earlier steps have freed stays with the process: hold it, all but 4 MB

    def step(self, step, loss, tokens_per_s, memory_bytes):
        if step == 4:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + 4 * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
            try:
                while True:
                    self.hoard.append(torch.empty(2**18, dtype=torch.uint8))
            except RuntimeError:
                del self.hoard[-16:]

def job(parts, resume):
    return FinetuneJob(
        data=make_orders("train", 400),
        model=sys.argv[1],
        lora=LoRAConfig(rank=4),
        train=TrainConfig(steps=8, batch_size=32, gradient_accumulation=parts),
        data_config=DataConfig(max_length=512),
        run=RunConfig(out=Path(sys.argv[2]), name="run", save_every_steps=2, samples=0,
                      device="cpu", eval_every_steps=8),
        resume=resume,
    )

try:
    finetune(job(1, False), Starve())
except TrainingError as error:
    print(error)
Starve.hoard.clear()
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("resumed to", finetune(job(4, True)).result.steps)
"""


@pytest.mark.slow
def test_a_run_that_is_starved_says_what_to_change_and_goes_on(
    tiny_folder: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tiny_folder), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    said, resumed = done.stdout.strip().splitlines()
    (step,) = re.findall(r"Memory ran out at step (\d) of 8 on cpu", said)
    assert int(step) > 4
    planned = re.findall(r"It was planned to take ([\d.]+) GB \(weights [\d.]+, gradients", said)
    assert planned
    assert re.search(r"activations ([\d.]+), loss ([\d.]+), process ([\d.]+)\)", said)
    assert "Most of it: activations and loss of 32 sequences at once" in said
    (less,) = re.findall(r"--gradient-accumulation 2 instead of 1 \(.* about ([\d.]+) GB\)", said)
    assert float(less) < float(planned[0])
    assert f"The checkpoint of step {(int(step) - 1) // 2 * 2} is whole" in said
    assert "can't allocate memory" in said
    assert resumed == "resumed to 8"
