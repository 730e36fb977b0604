"""A first step that runs out of memory is tried again with less, and nothing is trained twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lora.adapters.apply import apply_lora
from lora.config import LoRAConfig, TrainConfig
from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder
from lora.device import choose_device
from lora.fast.llama.checkpointing import MODES, ActivationCheckpointing
from lora.fast.llama.network import FastNetwork
from lora.fast.llama.passes import FastPass
from lora.fast.runner import FastStepRunner
from lora.fast.weights.update import FlatUpdate

CONFIG = TrainConfig(learning_rate=1e-2, gradient_accumulation=2, batch_size=4)
LORA = LoRAConfig(rank=4, dropout=0.1, init_seed=0)
Chosen = list[ActivationCheckpointing | None]


@pytest.fixture
def start(tiny_decoder: Callable[..., Decoder]) -> Callable[..., tuple[FastStepRunner, Decoder]]:
    def build(mode: str, leaner: Chosen) -> tuple[FastStepRunner, Decoder]:
        torch.manual_seed(0)
        model = tiny_decoder(dtype=torch.float32)
        apply_lora(model, LORA)
        return (
            FastStepRunner(
                model,
                choose_device("cpu"),
                CONFIG,
                checkpointing=MODES[mode],
                leaner=lambda: leaner.pop(0),
            ),
            model,
        )

    return build


def train(runner: FastStepRunner, make_batch: Callable[..., Batch], steps: range) -> list[float]:
    for step in steps:
        batches = [make_batch(2 * step + n, packed=True) for n in range(2)]
        runner.launch(step, batches, [1e-2])
    return [outcome.losses[0] for outcome in runner.finished(wait=True)]


def fail_times(function: Callable[..., object], n_times: int) -> Callable[..., object]:
    """Return `function` that runs, and then runs out of memory, so many times."""
    left = [n_times]

    def failing(*arguments: object, **settings: object) -> object:
        result = function(*arguments, **settings)
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return result

    return failing


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        (FastNetwork, "buffers"),
        (FastPass, "run"),
        (FastPass, "backward"),
        (FlatUpdate, "count_tokens"),
    ],
)
def test_a_leaner_mode_trains_as_if_it_had_been_the_first(
    owner: type,
    method: str,
    start: Callable[..., tuple[FastStepRunner, Decoder]],
    make_batch: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, model = start("full", [])
    losses = train(expected, make_batch, range(1, 4))
    runner, other = start("none", [MODES["cheap"], MODES["full"]])
    monkeypatch.setattr(owner, method, fail_times(getattr(owner, method), 2))
    assert train(runner, make_batch, range(1, 4)) == losses
    assert runner.step.checkpointing == MODES["full"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name))
    for one, two in zip(
        expected.step.optimizer_state().values(),
        runner.step.optimizer_state().values(),
        strict=True,
    ):
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_what_cannot_be_tried_again_is_raised(
    start: Callable[..., tuple[FastStepRunner, Decoder]],
    make_batch: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:  # nothing leaner is left
        patch.setattr(FastPass, "run", fail_times(FastPass.run, 1))
        runner, _ = start("none", [None])
        with pytest.raises(torch.OutOfMemoryError):
            train(runner, make_batch, range(1, 2))
    with monkeypatch.context() as patch:  # the update was made
        patch.setattr(FlatUpdate, "run", fail_times(FlatUpdate.run, 1))
        runner, _ = start("none", [MODES["full"]])
        with pytest.raises(torch.OutOfMemoryError):
            train(runner, make_batch, range(1, 2))
    runner, _ = start("none", [MODES["full"]])  # a later step
    train(runner, make_batch, range(1, 2))
    monkeypatch.setattr(FastPass, "run", fail_times(FastPass.run, 1))
    with pytest.raises(torch.OutOfMemoryError):
        train(runner, make_batch, range(2, 3))
    assert runner.step.checkpointing == MODES["none"]


def test_other_errors_of_the_first_step_are_raised(
    start: Callable[..., tuple[FastStepRunner, Decoder]],
    make_batch: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: FastPass) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(FastPass, "run", fail)
    runner, _ = start("none", [MODES["full"]])
    with pytest.raises(RuntimeError, match="shapes"):
        train(runner, make_batch, range(1, 2))
