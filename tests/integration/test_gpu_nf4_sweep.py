"""Stacked adapters over an nf4 base on a GPU: unpacked values, isolation, resume, a sweep."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora.config import DataConfig, RunConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.decoder.decoder import Decoder
from lora.device import choose_device
from lora.fast.stacked_runner import FastStackedRunner, choose_stacked_runner
from lora.fast.stacked_step import StackedFastStep
from lora.fast.weights.unpacked import UnpackedStackedProjection
from lora.kernels.step.jit import HAS_TRITON
from lora.runs.read_record import read_run_record
from lora.sweep import SweepJob, sweep
from lora.sweep.grid import Grid
from tests.integration.test_gpu_nf4 import build, unpacked
from tests.integration.test_gpu_sweep import RATES, TRAIN, fast_step, scheduled, stack, together

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and HAS_TRITON), reason="needs a CUDA device and Triton"
    ),
]


def trained(model: Decoder, *, breaks: bool = False) -> StackedFastStep:
    """Return the step after four steps; `breaks`: an adapter is NaN before the third."""
    stacked = stack(model)
    step = fast_step(model, stacked, TRAIN, merges=False)
    for number in range(4):
        if breaks and number == 2:
            next(iter(stacked.layers.values())).lora_A.data[1, 0, 0] = math.nan
            step.refresh()
        step.launch([together(number, packed=True)], RATES, number + 1)
    return step


def test_steps_are_those_over_the_unpacked_values_to_the_bit() -> None:
    model = build()
    plain, quantised = trained(unpacked(model)), trained(model)
    assert isinstance(quantised.network.qkv, UnpackedStackedProjection)
    assert torch.equal(plain.report, quantised.report)
    assert torch.equal(plain.flat.values, quantised.flat.values)


def test_an_adapter_that_is_not_finite_leaves_the_bits_of_the_others() -> None:
    whole, broken = trained(build()), trained(build(), breaks=True)
    assert broken.update.taken_steps.tolist() == [4.0, 2.0, 4.0]
    for k in (0, 2):
        for name in ("values", "mean", "square"):
            assert torch.equal(getattr(whole.flat, name)[k], getattr(broken.flat, name)[k])


def test_restored_training_continues_with_the_same_bits() -> None:
    choice = choose_device("cuda")
    said: list[str] = []

    def begin() -> FastStackedRunner:
        model = build()
        runner = choose_stacked_runner(model, stack(model), TRAIN, choice, on_message=said.append)
        assert isinstance(runner, FastStackedRunner)
        return runner

    def go(training: FastStackedRunner, numbers: range) -> None:
        for number in numbers:
            training.launch(number + 1, [together(number, packed=True)], scheduled(number))
        training.finished(wait=True)

    whole, half, rest = begin(), begin(), begin()
    assert "nf4 weights unpacked for each of them" in said[0]
    go(whole, range(6))
    go(half, range(3))
    for k in range(3):
        rest.restore(half.state(k), step=3, adapter=k)
    go(rest, range(3, 6))
    assert torch.equal(rest.step.flat.values, whole.step.flat.values)


def test_a_sweep_in_waves_ends_as_with_the_plain_step(tiny_folder: Path, tmp_path: Path) -> None:
    job = SweepJob(
        data=make_orders("train", 32),
        grid=Grid(rank=(2, 4), learning_rate=(1e-3, 3e-3)),
        model=str(tiny_folder),
        train=TrainConfig(steps=8, batch_size=4),
        data_config=DataConfig(max_length=128),
        run=RunConfig(out=tmp_path, name="fast", eval_every_steps=4, device="cuda"),
        at_once=2,
        base_dtype="nf4",
    )
    fast = sweep(job)
    assert read_run_record(fast.folder).base_dtype == "nf4"
    plain = sweep(replace(job, run=replace(job.run, name="plain", fast=False)))
    kept = {state.name: state.eval_loss for state in plain.candidates}
    for candidate in fast.candidates:
        assert candidate.status == "done"
        assert candidate.eval_loss == pytest.approx(kept[candidate.name], rel=1e-2)
