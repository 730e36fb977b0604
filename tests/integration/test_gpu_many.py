"""Whole runs on two GPUs against the same runs on one: losses within bf16's rounding, and no hang.

All runs on two GPUs are taken in turn by one pair of processes, those on one GPU by another process
at the same time. They have a limit together: processes that wait for each other are killed, and
the runs that were not reached fail.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora.config import DataConfig, LoRAConfig, Parallel, RunConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.decoder.decoder import build_decoder
from lora.decoder.families import decoder_config
from lora.distributed.world import World
from lora.errors import Interrupted
from lora.finetune import FinetuneJob, finetune
from lora.kernels.step.jit import HAS_TRITON
from lora.pretrained.hf_weights import save_decoder
from lora.runs.disk import read_json, read_rows
from lora.runs.progress import NoProgress
from lora.training.callbacks import Callback, StepEvent
from tests.distributed.processes import run_processes

N_GPUS = torch.cuda.device_count()
DEVICE = "cuda"
LIMIT_S = float(os.environ.get("GPU_TESTS_LIMIT_S", "200"))
"""For all runs of a number of processes."""
ROUNDING = 0.01
"""Relative difference of losses at a low learning rate: bf16 matmuls of other shapes."""
IS_HOPPER = N_GPUS > 0 and torch.cuda.get_device_capability() >= (9, 0)
SIGNAL_STEP = 7
TWO_GPUS = "test_two_gpus_are_as_one"
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


@dataclass(frozen=True)
class Case:
    """A run, how it is parallel on two GPUs, and what its step says of itself."""

    job: FinetuneJob
    step: str
    parallel: Parallel = "ddp"
    says: str = ""
    """On two GPUs, in the same line."""


def _take(world: World, jobs: Sequence[FinetuneJob], signal_at: Sequence[int]) -> list[int]:
    """Take the runs in turn; return the code with which each was interrupted, 0 if none was."""
    codes, process_ids = [], world.gather(os.getpid(), "process ids")
    for job, step in zip(jobs, signal_at, strict=True):
        said, begun_s = Messages(), time.monotonic()
        # Callbacks are rank 0's; the signal goes to the last rank.
        callbacks = [SignalAt(step, process_ids[-1])] if step else []
        try:
            finetune(job, said, callbacks=callbacks)
            codes.append(0)
        except Interrupted as interrupted:
            codes.append(interrupted.exit_code)
        if world.is_main:  # what all processes of a failed set leave for the tests
            (job.directory / "said.json").write_text(json.dumps(said.texts))
            print(f"{job.directory}: {time.monotonic() - begun_s:.1f} s", flush=True)
    return codes


def _cases(folder: Path, qwen3: Path, out: Path) -> dict[str, Case]:
    plain = FinetuneJob(
        data=make_orders("train", 48),
        model=str(folder),
        lora=LoRAConfig(rank=4, init_seed=0),
        train=TrainConfig(steps=20, batch_size=8, learning_rate=2e-3, warmup_fraction=0.0),
        data_config=DataConfig(max_length=128),
        run=RunConfig(out=out, device=DEVICE, eval_every_steps=10, samples=0),
    )
    low = replace(plain.train, learning_rate=2e-4)
    full = replace(plain, lora=None, train=low)
    odd = replace(plain, data=_mixed_texts(), train=replace(plain.train, batch_size=3))
    accumulated = replace(plain.train, gradient_accumulation=2)
    dropout = LoRAConfig(rank=4, init_seed=0, dropout=0.3)
    not_fast = replace(plain.run, fast=False)
    sharded, fsdp2 = "sharded over 2 processes", "FSDP2"
    nf4 = replace(plain, base_dtype="nf4")
    cases = {
        "packed": Case(plain, "fast step"),
        "graphs": Case(odd, "fast step"),
        "sharded": Case(plain, "fast step", "fsdp", sharded),
        "accumulated": Case(replace(plain, train=accumulated), "fast step"),
        "dropout": Case(replace(plain, lora=dropout), "fast step"),
        "captured": Case(replace(plain, model=str(qwen3)), "captured step"),
        "full": Case(full, "fast step"),
        "plain": Case(replace(plain, run=not_fast), "plain step"),
        "full, sharded": Case(replace(full, run=not_fast), "plain step", "fsdp", fsdp2),
        "nf4, sharded": Case(nf4, "fast step", "fsdp", sharded),
        "nf4, FSDP2": Case(replace(nf4, run=not_fast), "plain step", "fsdp", fsdp2),
    }
    if IS_HOPPER:
        fp8 = replace(plain, base_dtype="fp8")
        cases["fp8"] = Case(fp8, "fast step")
        cases["fp8, sharded"] = Case(fp8, "fast step", "fsdp", sharded)
    return cases


def _mixed_texts() -> list[dict[str, str]]:
    """Return texts of which some fill a sequence alone and others share one.

    A graph for packed sequences here, one for a single document there: collectives must agree. Of
    three sequences for two processes one process gets a sequence of padding, too.
    """
    texts = [
        " ".join(turn["content"] for turn in row["messages"]) for row in make_orders("train", 30)
    ]
    long = " ".join(texts[:8])
    mixed = [
        text for number, short in enumerate(texts[:20]) for text in (short, f"{number} {long}")
    ]
    return [{"text": text} for text in mixed]


@dataclass(frozen=True)
class Runs:
    """What became of all runs."""

    cases: dict[str, Case]
    out: Path
    failures: dict[int, str]
    """By number of GPUs: why the processes ended early."""
    codes: list[list[int]]
    """Of the two processes, by run; the last one was sent a signal."""


def _directory(out: Path, gpus: int, name: str) -> RunConfig:
    return RunConfig(out=out / str(gpus), name=name.replace(", ", "-"))


def _named(job: FinetuneJob, out: Path, gpus: int, name: str, **changes: Any) -> FinetuneJob:
    place = _directory(out, gpus, name)
    return replace(job, run=replace(job.run, out=place.out, name=place.name, **changes))


def _selected(request: pytest.FixtureRequest) -> set[str]:
    """Return the names of the runs that the session's tests read: pytest's -k leaves some out."""
    names = set()
    for item in request.session.items:
        assert isinstance(item, pytest.Function)
        if item.path == request.path:
            name = item.callspec.params["name"] if item.originalname == TWO_GPUS else "packed"
            names.add(str(name))
    return names


@pytest.fixture(scope="module")
def runs(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Runs:
    out = tmp_path_factory.mktemp("many")
    qwen3 = out / "qwen3"
    shutil.copytree(tiny_folder, qwen3)
    config = json.loads((qwen3 / "config.json").read_text())
    config |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 8}
    save_decoder(build_decoder(decoder_config(config), seed=1), qwen3)
    cases, selected = _cases(tiny_folder, qwen3, out), _selected(request)
    cases = {name: case for name, case in cases.items() if name in selected}
    one = [_named(case.job, out, 1, name) for name, case in cases.items()]
    two = [_named(c.job, out, 2, name, parallel=c.parallel) for name, c in cases.items()]
    if "packed" in cases:
        two.append(_named(cases["packed"].job, out, 2, "signal"))
    failures: dict[int, str] = {}

    def take(gpus: int, jobs: list[FinetuneJob]) -> list[list[int]]:
        steps = [SIGNAL_STEP if job.run.name == "signal" else 0 for job in jobs]
        try:
            return run_processes(gpus, _take, jobs, steps, timeout_s=LIMIT_S, device_type=DEVICE)
        except AssertionError as error:
            failures[gpus] = str(error)
            return []

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(take, n, jobs) for n, jobs in ((1, one), (2, two))]
        codes = [one.result() for one in waiting][1]
    return Runs(cases, out, failures, codes)


def _read(runs: Runs, gpus: int, name: str) -> tuple[list[str], Path]:
    """Return what a run said, and its directory; fail with the reason if it was not reached."""
    place = _directory(runs.out, gpus, name)
    folder = place.out / str(place.name)
    if not (folder / "said.json").is_file():
        pytest.fail(f"not done on {gpus}: {runs.failures.get(gpus, 'no reason known')}")
    return json.loads((folder / "said.json").read_text()), folder


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


@pytest.mark.parametrize(
    "name",
    [
        "packed", "graphs", "sharded", "accumulated", "dropout", "captured", "full", "plain",
        "full, sharded", "nf4, sharded", "nf4, FSDP2", "fp8", "fp8, sharded",
    ],
)  # fmt: skip
def test_two_gpus_are_as_one(runs: Runs, name: str) -> None:
    if name.startswith("fp8") and not IS_HOPPER:
        pytest.skip("fp8 matmuls need capability 9.0")
    case = runs.cases[name]
    (one, folder), (two, other) = _read(runs, 1, name), _read(runs, 2, name)
    assert any(text.startswith(case.step) for text in one), one
    assert any(text.startswith(case.step) and case.says in text for text in two), two
    record = read_json(other / "run.json")
    assert (record["world_size"], record["parallel"]) == (2, case.parallel)
    assert_near(folder, other)


def test_a_signal_to_one_process_stops_all_and_one_resumes(runs: Runs) -> None:
    _, folder = _read(runs, 2, "signal")
    assert [codes[-1] for codes in runs.codes] == [143, 143]
    steps = [row["step"] for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    assert SIGNAL_STEP <= steps[-1] < 20
    job = _named(runs.cases["packed"].job, runs.out, 2, "signal")
    resumed = [replace(job, resume=True)]
    assert run_processes(1, _take, resumed, [0], timeout_s=60, device_type=DEVICE) == [[0]]
    assert_near(_read(runs, 2, "packed")[1], folder)
