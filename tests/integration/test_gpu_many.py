"""One run on two GPUs against the same run on one: losses within bf16's rounding, and no hang.

Each test has its own processes and a limit of its own; a process that waits for ever is killed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora.config import DataConfig, LoRAConfig, Parallel, RunConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.distributed.world import World
from lora.errors import Interrupted
from lora.finetune import FinetuneJob, finetune
from lora.finetune.job import BaseDtype
from lora.kernels.step.jit import HAS_TRITON
from lora.runs.disk import read_json, read_rows
from lora.runs.progress import NoProgress
from lora.training.callbacks import Callback, StepEvent
from tests.distributed.processes import run_processes

N_GPUS = torch.cuda.device_count()
DEVICE = "cuda"
LIMIT_S = 90
"""For one run of several processes, their start and compilation included."""
ROUNDING = 0.01
"""Relative difference of losses at a low learning rate: bf16 matmuls of other shapes."""
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(N_GPUS < 2, reason=f"needs two CUDA devices, there are {N_GPUS}"),
    pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"),
]


class Messages(NoProgress):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        """Keep it."""
        self.texts.append(text)


@dataclass
class SignalAt(Callback):
    """Sends SIGTERM to a process after a step."""

    step: int
    process_id: int

    def on_step(self, event: StepEvent) -> None:
        """Send it, if this is the step."""
        if event.step == self.step:
            os.kill(self.process_id, signal.SIGTERM)


@pytest.fixture
def job(tiny_folder: Path, tmp_path: Path) -> FinetuneJob:
    return FinetuneJob(
        data=make_orders("train", 48),
        model=str(tiny_folder),
        lora=LoRAConfig(rank=4, init_seed=0),
        train=TrainConfig(steps=20, batch_size=8, learning_rate=2e-3, warmup_fraction=0.0),
        data_config=DataConfig(max_length=128),
        run=RunConfig(out=tmp_path, device=DEVICE, eval_every_steps=10, samples=0),
    )


def _run(world: World, job: FinetuneJob, signal_at: int = 0) -> tuple[list[str], int]:
    """Return what the run said in this process, and the code with which it was interrupted."""
    said, process_ids = Messages(), world.gather(os.getpid(), "process ids")
    # Callbacks are rank 0's; the signal goes to the last rank.
    callbacks = [SignalAt(signal_at, process_ids[-1])] if signal_at else []
    try:
        finetune(job, said, callbacks=callbacks)
    except Interrupted as interrupted:
        return said.texts, interrupted.exit_code
    return said.texts, 0


def run_on(gpus: int, job: FinetuneJob, name: str, *, signal_at: int = 0) -> tuple[list[Any], Path]:
    """Return what each process of the run came to, and the run directory."""
    job = replace(job, run=replace(job.run, name=name))
    outcomes = run_processes(gpus, _run, job, signal_at, timeout_s=LIMIT_S, device_type=DEVICE)
    return outcomes, job.directory


def assert_same_course(
    job: FinetuneJob, step: str, *, parallel: Parallel = "ddp", says: str = ""
) -> None:
    """Fail unless two GPUs and one give the same losses, taking the step that says `step`.

    `says`: what the line about the step on two GPUs holds, too.
    """
    one, folder = run_on(1, job, "one")
    two, other = run_on(2, replace(job, run=replace(job.run, parallel=parallel)), "two")
    for texts, _ in (*one, *two):
        assert any(text.startswith(step) for text in texts), texts
    for texts, _ in two:
        assert any(text.startswith(step) and says in text for text in texts), texts
    record = read_json(other / "run.json")
    assert (record["world_size"], record["parallel"]) == (2, parallel)
    assert_near(folder, other)


def assert_near(folder: Path, other: Path) -> None:
    """Fail unless the metrics of two run directories differ by rounding alone."""
    rows, others = (read_rows(path / "metrics.jsonl") for path in (folder, other))
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, same in zip(rows, others, strict=True):
        assert row.keys() == same.keys()
        for key in ("loss", "eval_loss"):
            if key in row:
                assert same[key] == pytest.approx(row[key], rel=ROUNDING), (row, same)
        assert same.get("tokens") == row.get("tokens")
    norms = [
        [row["gradient_norm"] for row in found if "gradient_norm" in row]
        for found in (rows, others)
    ]
    assert norms[1][0] == pytest.approx(norms[0][0], rel=0.05)


def test_the_fast_step_on_packed_sequences(job: FinetuneJob) -> None:
    assert_same_course(job, "fast step")


def test_the_fast_step_with_gradient_accumulation(job: FinetuneJob) -> None:
    train = replace(job.train, gradient_accumulation=2)
    assert_same_course(replace(job, train=train), "fast step")


def test_processes_whose_batches_take_different_graphs(job: FinetuneJob) -> None:
    """A graph for packed sequences here, one for a single document there: collectives must agree.

    The last batches of three sequences for two processes hold a sequence of padding, too.
    """
    short = make_orders("train", 30)
    text = " ".join(turn["content"] for row in short[:8] for turn in row["messages"])
    whole = [{"text": f"{number} {text}"} for number in range(20)]  # longer than a sequence
    mixed = [row for pair in zip(short, whole, strict=False) for row in pair]
    texts = [
        row if "text" in row else {"text": " ".join(t["content"] for t in row["messages"])}
        for row in mixed
    ]
    train = replace(job.train, batch_size=3)
    assert_same_course(replace(job, data=texts, train=train), "fast step")


def test_the_captured_step(job: FinetuneJob, tiny_folder: Path, tmp_path: Path) -> None:
    from lora.decoder.decoder import build_decoder
    from lora.decoder.families import decoder_config
    from lora.pretrained.hf_weights import save_decoder

    folder = tmp_path / "qwen3"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 8}
    save_decoder(build_decoder(decoder_config(config), seed=1), folder)
    assert_same_course(replace(job, model=str(folder)), "captured step")


def test_dropout_draws_one_processes_masks(job: FinetuneJob) -> None:
    lora = LoRAConfig(rank=4, init_seed=0, dropout=0.3)
    assert_same_course(replace(job, lora=lora), "fast step")


def test_an_fp8_base(job: FinetuneJob) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("fp8 matmuls need capability 9.0")
    assert_same_course(replace(job, base_dtype="fp8"), "fast step")


def test_full_fine_tuning(job: FinetuneJob) -> None:
    train = replace(job.train, learning_rate=2e-4)
    assert_same_course(replace(job, lora=None, train=train), "fast step")


def test_sharded_lora(job: FinetuneJob) -> None:
    assert_same_course(job, "fast step", parallel="fsdp", says="sharded over 2 processes")


def test_sharded_fp8(job: FinetuneJob) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("fp8 matmuls need capability 9.0")
    job = replace(job, base_dtype="fp8")
    assert_same_course(job, "fast step", parallel="fsdp", says="sharded over 2 processes")


def test_sharded_full_fine_tuning(job: FinetuneJob) -> None:
    train, run = replace(job.train, learning_rate=2e-4), replace(job.run, fast=False)
    job = replace(job, lora=None, train=train, run=run)
    assert_same_course(job, "plain step", parallel="fsdp", says="FSDP2")


def test_the_plain_step(job: FinetuneJob) -> None:
    assert_same_course(replace(job, run=replace(job.run, fast=False)), "plain step")


@pytest.mark.parametrize("base_dtype", ["auto", "fp8"])
def test_sharded_weights(job: FinetuneJob, base_dtype: BaseDtype) -> None:
    if base_dtype == "fp8" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("fp8 matmuls need capability 9.0")
    job = replace(job, base_dtype=base_dtype, run=replace(job.run, samples=2, sample_tokens=8))
    sharded = replace(job, run=replace(job.run, parallel="fsdp"))
    _, folder = run_on(1, job, "one")
    two, other = run_on(2, sharded, "two")
    for texts, _ in two:
        assert any("frozen weights sharded over 2 processes" in text for text in texts), texts
    assert read_json(other / "run.json")["parallel"] == "fsdp"
    assert_near(folder, other)
    # One process goes on with what two have trained.
    longer = replace(job, train=replace(job.train, steps=24), resume=True)
    outcomes, _ = run_on(1, longer, "two")
    assert outcomes[0][1] == 0


def test_a_signal_to_one_process_stops_all_and_one_resumes(job: FinetuneJob) -> None:
    (_, whole) = run_on(2, job, "whole")
    outcomes, folder = run_on(2, job, "part", signal_at=7)
    assert [code for _, code in outcomes] == [143, 143]
    steps = [row["step"] for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    assert 7 <= steps[-1] < 20
    outcomes, folder = run_on(1, replace(job, resume=True), "part")
    assert outcomes[0][1] == 0
    assert_near(whole, folder)
