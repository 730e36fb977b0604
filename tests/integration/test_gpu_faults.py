"""On a GPU: a killed run ends with the same bytes, and memory does not creep."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.data.orders import make_orders
from lora.finetune import FinetuneJob, finetune
from lora.progress import NoProgress

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS, MOMENTS = 60, 5
FILES = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "metrics.jsonl")


def start(tiny_folder: Path, orders_file: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    words = f"finetune --data {orders_file} --model {tiny_folder} --out {out} --name run"
    words += f" --device cuda --steps {STEPS} --batch-size 4 --rank 4 --dropout 0.1"
    words += " --eval-every-steps 20 --save-every-steps 3 --max-length 128 --samples 0"
    return subprocess.Popen(
        [sys.executable, "-m", "lora", *words.split(), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ.copy(),
    )


def finish(process: subprocess.Popen[str]) -> str:
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return " ".join(said.split())


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def kill_at(process: subprocess.Popen[str], run: Path, step: int) -> None:
    metrics = run / "metrics.jsonl"
    while process.poll() is None:
        if metrics.is_file() and metrics.read_bytes().count(b"gradient_norm") >= step:
            break
        time.sleep(0.001)
    process.kill()
    process.communicate()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("flags", "words"),
    [(("--deterministic",), "plain step: as asked"), ((), "one CUDA graph")],
    ids=["deterministic", "fast"],
)
def test_kill_9_at_random_moments_changes_no_byte(
    tiny_folder: Path, orders_file: Path, tmp_path: Path, flags: tuple[str, ...], words: str
) -> None:
    assert words in finish(start(tiny_folder, orders_file, tmp_path / "whole", *flags))
    expected, draw = results(tmp_path / "whole" / "run"), random.Random(str(flags))
    for number in range(MOMENTS):
        out, step = tmp_path / f"killed-{number}", draw.randrange(1, STEPS)
        kill_at(start(tiny_folder, orders_file, out, *flags), out / "run", step)
        finish(start(tiny_folder, orders_file, out, *flags, "--resume"))
        assert results(out / "run") == expected, f"killed after step {step}"


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
def test_memory_is_flat_over_five_hundred_steps(
    tiny_folder: Path, tmp_path: Path, fast: bool
) -> None:
    """By torch's allocator: nothing that a step makes outlives it."""
    seen: dict[int, tuple[int, int]] = {}

    class Watch(NoProgress):
        def step(self, step: int, loss: float, tokens_per_s: float, memory_bytes: int) -> None:
            if step in (100, 600):
                torch.cuda.synchronize()
                seen[step] = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    job = FinetuneJob(
        data=make_orders("train", 40),
        model=str(tiny_folder),
        lora=LoRAConfig(rank=4, dropout=0.1),
        train=TrainConfig(steps=600, batch_size=4, learning_rate=1e-3),
        data_config=DataConfig(max_length=128),
        run=RunConfig(out=tmp_path, name="flat", device="cuda", samples=0, fast=fast),
    )
    finetune(replace(job, run=replace(job.run, eval_every_steps=50, save_every_steps=50)), Watch())
    grown_bytes = [after - before for before, after in zip(seen[100], seen[600], strict=True)]
    # Rows of several lengths are no leak: a step holds at most a batch more than another.
    assert grown_bytes[0] <= 2**20, f"allocated: {grown_bytes[0]:,} bytes more after 500 steps"
    assert grown_bytes[1] <= 32 * 2**20, f"reserved: {grown_bytes[1]:,} bytes more"
