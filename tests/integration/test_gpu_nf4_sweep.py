"""Stacked adapters over an nf4 base on a GPU: unpacked values, isolation, resume, a sweep."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lora.decoder.decoder import Decoder
from lora.device import choose_device
from lora.fast.stacked_runner import FastStackedRunner, choose_stacked_runner
from lora.fast.stacked_step import StackedFastStep
from lora.fast.weights.unpacked import UnpackedStackedProjection
from lora.kernels.step.jit import HAS_TRITON
from lora.runs.read_record import read_run_record
from tests.fast.test_unpacked import unpacked
from tests.integration.test_gpu_nf4 import build
from tests.integration.test_gpu_sweep import (
    RATES,
    TRAIN,
    fast_step,
    resumed_halfway,
    stack,
    sweep_alike,
    together,
)

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

    whole, resumed = resumed_halfway(begin)
    assert "nf4 weights unpacked for each of them" in said[0]
    assert torch.equal(resumed.values, whole.values)


def test_a_sweep_in_waves_ends_as_with_the_plain_step(tiny_folder: Path, tmp_path: Path) -> None:
    fast = sweep_alike(tiny_folder, tmp_path, steps=8, base_dtype="nf4")
    assert read_run_record(fast.folder).base_dtype == "nf4"
