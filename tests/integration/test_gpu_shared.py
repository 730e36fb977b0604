"""Sweeps, comparisons, evaluations and answers on two GPUs against one."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from lora.cli import main
from lora.compare import compare
from lora.compare.config import CompareConfig
from lora.compare.decoder_target import DecoderTarget
from lora.config import DataConfig, RunConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.distributed.world import World
from lora.kernels.step.jit import HAS_TRITON
from lora.runs.comparison_record import Comparison
from lora.runs.disk import read_json, read_rows
from lora.runs.sweep_record import CandidateState
from lora.sweep import SweepJob, sweep
from lora.sweep.grid import Grid
from tests.distributed.processes import run_processes

N_GPUS = torch.cuda.device_count()
DEVICE = "cuda"
LIMIT_S = 200
ROUNDING = 0.01
"""Relative difference of losses: bf16 matmuls of other shapes."""
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(N_GPUS < 2, reason=f"needs two CUDA devices, there are {N_GPUS}"),
    pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"),
]


def _printed(words: list[str]) -> list[Any]:
    with redirect_stdout(StringIO()) as out:
        assert main(words) == 0
    return [json.loads(line) for line in out.getvalue().splitlines()]


def _sweep(job: SweepJob) -> list[CandidateState]:
    return sorted(sweep(job).candidates, key=lambda state: state.name)


def _share(
    world: World,
    job: SweepJob,
    calls: list[list[str]],
    target: DecoderTarget,
    config: CompareConfig,
) -> tuple[list[CandidateState], list[list[Any]], Comparison]:
    states, printed = _sweep(job), [_printed(words) for words in calls]
    return states, printed, compare(target, config).comparison


def test_two_gpus_share_as_one_does_alone(
    tiny_folder: Path, orders_file: Path, tmp_path: Path
) -> None:
    run = RunConfig(out=tmp_path, name="one", eval_every_steps=4, device=DEVICE, samples=2)
    train = TrainConfig(steps=12, batch_size=4)
    data, how_read = make_orders("train", 32), DataConfig(max_length=128)
    job = SweepJob(
        data=data,
        grid=Grid(rank=(2, 4), learning_rate=(5e-4, 1e-3)),
        model=str(tiny_folder),
        train=train,
        data_config=how_read,
        run=run,
        halving=True,
    )
    ask = ["--model", str(tiny_folder), "--device", DEVICE, "--max-new-tokens", "6", "--json"]
    calls = [
        ["eval", str(orders_file), "--answers", "all", "--max-length", "128", *ask],
        ["generate", "a lamp", "two mugs", "red", *ask],
    ]
    target = DecoderTarget(data=data, model=str(tiny_folder), data_config=how_read)
    config = CompareConfig(train=train, run=replace(run, name="compare-one"))
    alone, expected = _sweep(job), [_printed(words) for words in calls]
    compared = compare(target, config).comparison

    two = replace(job, run=replace(run, name="two"))
    config = replace(config, run=replace(run, name="compare-two"))
    found = run_processes(
        2, _share, two, calls, target, config, timeout_s=LIMIT_S, device_type=DEVICE
    )
    (states, printed, comparison), (others, nothing, other) = found
    assert (states, comparison) == (others, other)
    for own, wanted in zip(states, alone, strict=True):
        assert (own.name, own.row) == (wanted.name, wanted.row)
        if own.stopped_at == wanted.stopped_at:
            assert own.eval_loss == pytest.approx(wanted.eval_loss, rel=ROUNDING)
    assert read_json(tmp_path / "two" / "run.json")["world_size"] == 2
    assert [row["rank"] for row in read_rows(tmp_path / "two" / "timings.jsonl")][:2] == [0, 1]
    assert nothing == [[], []]
    assert printed[0][0]["base"]["loss"] == pytest.approx(expected[0][0]["base"]["loss"], rel=1e-6)
    assert len(printed[1]) == len(expected[1]) == 3
    for member, same in zip(comparison.members, compared.members, strict=True):
        assert member.final_eval_loss == pytest.approx(same.final_eval_loss, rel=ROUNDING)
        assert "cuda:0" in comparison.device
