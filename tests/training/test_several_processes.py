"""Steps and runs of several processes equal those of one, whatever each of them gets to learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora.adapters.apply import apply_lora, train_token_rows
from lora.config import LoRAConfig, TrainConfig
from lora.data.sequences.batches import Batch, BatchStream, ordered_batches
from lora.decoder.decoder import Decoder
from lora.decoder.language_model import LanguageModel
from lora.distributed.world import ALONE, StopFlags, World
from lora.fast.captured import CapturedStep, PlainForward, summed_loss
from lora.fast.llama.checkpointing import MODES
from lora.fast.runner import CapturedStepRunner, DeviceStepRunner, FastStepRunner
from lora.kernels.step.ops import PLAIN
from lora.pretrained.transformers_models.load import as_language_model
from lora.training.losses import loss_for
from lora.training.plain_step import PlainStepRunner
from lora.training.step_runner import StepRunner
from tests.distributed.models import (
    Steps,
    cpu_choice,
    random_sequences,
    take_steps,
    tiny_decoder,
    train_config,
    trained_copies,
    with_lora,
    worst_difference,
)
from tests.distributed.processes import run_processes

# Its processes are started once, in one of the workers that share the tests.
pytestmark = pytest.mark.xdist_group("steps_of_several")

FP32_STEPS = 20


Runner = Callable[[nn.Module, torch.dtype, TrainConfig, World], StepRunner]


def plain(model: nn.Module, dtype: torch.dtype, config: TrainConfig, world: World) -> StepRunner:
    return PlainStepRunner(model, loss_for(model), cpu_choice(torch.float32), config, world)


def fast(model: nn.Module, dtype: torch.dtype, config: TrainConfig, world: World) -> StepRunner:
    runner = FastStepRunner(cast(Decoder, model), cpu_choice(dtype), config, world=world)
    runner.choice = cpu_choice(torch.float32)  # autocast knows no fp64
    return runner


def captured(model: nn.Module, dtype: torch.dtype, config: TrainConfig, world: World) -> StepRunner:
    own, choice = cast(LanguageModel, model), cpu_choice(torch.float32)
    return CapturedStepRunner(own, choice, config, compiles=False, world=world)


@dataclass(frozen=True)
class Case:
    """What trains, on which batches, with which step."""

    model: Callable[[torch.dtype], nn.Module]
    config: TrainConfig
    packing: bool = True
    runner: Runner = plain


def _lora(dtype: torch.dtype) -> Decoder:
    return with_lora(tiny_decoder(dtype))


def _full(dtype: torch.dtype) -> Decoder:
    return tiny_decoder(dtype).requires_grad_(True)


def _modules(dtype: torch.dtype) -> Decoder:
    return with_lora(tiny_decoder(dtype, tied=False), modules_to_save=("embed_tokens",))


def _token_rows(dtype: torch.dtype) -> Decoder:
    model = with_lora(tiny_decoder(dtype))
    train_token_rows(model, [3, 5, 90])
    return model


def _dropout(dtype: torch.dtype) -> Decoder:
    return with_lora(tiny_decoder(dtype), dropout=0.3)


def _transformers(dtype: torch.dtype) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=97,
        max_position_embeddings=32,
    )
    model = as_language_model(transformers.LlamaForCausalLM(config).to(dtype))
    return apply_lora(model, LoRAConfig(rank=4, init_seed=3, dropout=0.3))


UNCLIPPED = train_config(16, 2, max_grad_norm=0.0)
"""The flat update has its norm in fp32: the factor of clipping would have that rounding."""
CASES = {
    "packed": Case(_lora, train_config(8)),
    "one document a sequence": Case(_lora, train_config(8), packing=False),
    "gradient accumulation": Case(_lora, train_config(16, 2)),
    "all weights": Case(_full, train_config(8)),
    "modules to save": Case(_modules, train_config(8)),
    "embedding rows": Case(_token_rows, train_config(8)),
    "dropout": Case(_dropout, train_config(16, 2)),
    "hand-written": Case(_lora, train_config(8), runner=fast),
    "hand-written, accumulation": Case(_lora, train_config(16, 2), packing=False, runner=fast),
    "hand-written, all weights": Case(_full, train_config(8), runner=fast),
    "hand-written, embedding rows": Case(_token_rows, train_config(16, 2), runner=fast),
    "hand-written, modules to save": Case(_modules, UNCLIPPED, runner=fast),
    "hand-written, dropout": Case(_dropout, train_config(16, 2), runner=fast),
    "captured": Case(_modules, UNCLIPPED, runner=captured),
    "captured, dropout": Case(_transformers, train_config(8), packing=False, runner=captured),
    "transformers": Case(_transformers, train_config(8)),
}
LONG = ("packed", "all weights", "hand-written")


def run_case(world: World, name: str, dtype: torch.dtype, n_steps: int) -> Steps:
    """Return what steps of a case come to on this process, and the loss after them."""
    case = CASES[name]
    torch.manual_seed(11)
    model = case.model(dtype)
    sequences = random_sequences(packing=case.packing)
    runner = case.runner(model, dtype, case.config, world)
    torch.manual_seed(12)  # of dropout
    done = take_steps(runner, sequences, case.config, n_steps, world)
    size = world.share.largest(3)
    (done.eval_loss,) = runner.evaluate(ordered_batches(sequences, size, share=world.share))
    done.trained = trained_copies(model)
    return done


class Poisoned(nn.Module):
    """A model whose second layer gives NaN for the token 5."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(97, 4), Poison()

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.second(self.first(ids), ids)
        return hidden


class Poison(nn.Module):
    """Gives NaN where the token is 5."""

    def forward(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return torch.where((ids == 5)[..., None], torch.nan, hidden)


def _sum_of_squares(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    return (model(batch.input_ids) ** 2).sum()[None], (batch.labels != -100).sum()[None]


def run_poisoned(world: World) -> Steps:
    """Return what three steps come to where a few sequences give NaN."""
    torch.manual_seed(0)
    model, config = Poisoned().double(), train_config(6)
    runner = PlainStepRunner(model, _sum_of_squares, cpu_choice(torch.float32), config, world)
    done = take_steps(runner, random_sequences(packing=False), config, 3, world)
    done.trained = trained_copies(model)
    return done


def _poisoned_logits(model: nn.Module, batch: Batch, packed: bool) -> Tensor:
    logits: Tensor = model(batch.input_ids).repeat_interleave(25, 2)  # (B, T, 100)
    return logits


def _poisoned_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    loss = summed_loss(_poisoned_logits(model, batch, packed=False), batch.labels)
    return loss[None], (batch.labels != -100).sum()[None]


def run_poisoned_on_device(world: World) -> Steps:
    """Return the same with a step that leaves its report on the device."""
    torch.manual_seed(0)
    model, config, choice = Poisoned().double(), train_config(6), cpu_choice(torch.float32)
    forward = PlainForward(partial(_poisoned_logits, model))
    step = CapturedStep(model, forward, PLAIN, choice, loss=summed_loss, world=world)
    runner = DeviceStepRunner(model, step, choice, "", _poisoned_loss, world, 6)
    done = take_steps(runner, random_sequences(packing=False), config, 3, world)
    done.trained = trained_copies(model)
    return done


def run_out_of_memory(world: World, failing_rank: int) -> Steps:
    """Return two steps of the hand-written step, the first of which one rank has no memory for."""
    model, config = with_lora(tiny_decoder(torch.float32)), train_config(8)
    left = [MODES["full"]]
    runner = FastStepRunner(
        model, cpu_choice(torch.float32), config, leaner=lambda: left.pop(0), world=world
    )
    allocate = runner.step.network.buffers

    def fail(*arguments: Any) -> Any:
        if left and world.rank == failing_rank:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return allocate(*arguments)

    with patch.object(runner.step.network, "buffers", fail):
        done = take_steps(runner, random_sequences(packing=True), config, 2, world)
    done.trained = trained_copies(model)
    done.notes = [runner.step.checkpointing.mode]
    return done


def run_asked(world: World, runner: Runner, *, is_damaged: bool = False) -> list[StopFlags]:
    """Return what three steps agree on: rank 0 asks in the second, the last rank in the third.

    Steps of a damaged model are not finite, and not taken.
    """
    model, config = with_lora(tiny_decoder(torch.float32)), train_config(8)
    if is_damaged:
        next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)
    steps = runner(model, torch.float32, config, world)
    stream = BatchStream(random_sequences(packing=True), 8, 7, share=world.share)
    agreed = []
    for step in (1, 2, 3):
        world.asked.callback = step == 2 and world.rank == 0
        world.asked.signal = 15 if step == 3 and world.rank == world.size - 1 else 0
        steps.launch(step, [next(stream)], [1e-3])
        outcomes = steps.finished(wait=True)
        assert all(bool(outcome.not_finite) == is_damaged for outcome in outcomes)
        agreed += [outcome.stops for outcome in outcomes]
    world.asked.clear()
    return agreed


def run_all(world: World) -> dict[str, Steps]:
    """Return all cases: one step in fp64, and for some many in fp32."""
    done = {name: run_case(world, name, torch.float64, 1) for name in CASES}
    done |= {f"{n}, long": run_case(world, n, torch.float32, FP32_STEPS) for n in LONG}
    done |= {"poisoned": run_poisoned(world), "on device": run_poisoned_on_device(world)}
    return {**done, "lean": run_out_of_memory(world, failing_rank=world.size - 1)}


def run_together(world: World) -> tuple[dict[str, Steps], list[list[StopFlags]]]:
    """Return all cases, and what processes agreed on with both kinds of step."""
    asked = [
        run_asked(world, runner, is_damaged=x) for runner in (plain, fast) for x in (False, True)
    ]
    return run_all(world), asked


@pytest.fixture(scope="module")
def alone() -> dict[str, Steps]:
    return run_all(ALONE)


# Three share batches unevenly; of two there are whole runs in tests/integration.
@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 3])
def answers(request: pytest.FixtureRequest) -> list[Any]:
    return run_processes(request.param, run_together)


@pytest.fixture(scope="module")
def together(answers: list[Any]) -> list[dict[str, Steps]]:
    return [steps for steps, _ in answers]


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_one_process(
    name: str, alone: dict[str, Steps], together: list[dict[str, Steps]]
) -> None:
    for done in together:
        assert done[name].n_tokens == alone[name].n_tokens
        assert worst_difference(done[name], alone[name]) < 1e-12
        assert done[name].eval_loss == pytest.approx(alone[name].eval_loss, rel=1e-12)


@pytest.mark.parametrize("name", LONG)
def test_twenty_steps_in_fp32_are_those_of_one_process(
    name: str, alone: dict[str, Steps], together: list[dict[str, Steps]]
) -> None:
    for done in together:
        assert worst_difference(done[f"{name}, long"], alone[f"{name}, long"]) < 1e-6


def test_all_processes_have_the_same_bits(together: list[dict[str, Steps]]) -> None:
    first = together[0]
    for other in together[1:]:
        for name, done in other.items():
            assert str(done.losses) == str(first[name].losses)  # as text: NaN is NaN
            assert done.eval_loss == first[name].eval_loss
            for key, values in done.trained.items():
                assert np.array_equal(values, first[name].trained[key]), (name, key)


def test_what_several_processes_ask_all_of_them_learn_in_the_same_step(answers: list[Any]) -> None:
    expected = [StopFlags(), StopFlags(callback=True), StopFlags(signal=15)]
    assert [agreed for _, agreed in answers] == [[expected] * 4] * len(answers)


def test_where_one_rank_runs_out_of_memory_all_go_leaner(
    alone: dict[str, Steps], together: list[dict[str, Steps]]
) -> None:
    for done in (alone, *together):
        assert done["lean"].notes == ["full"]
        assert worst_difference(done["lean"], alone["lean"]) < 1e-6


@pytest.mark.parametrize("name", ["poisoned", "on device"])
def test_a_step_that_is_not_finite_on_one_rank_is_taken_on_none(
    name: str, alone: dict[str, Steps], together: list[dict[str, Steps]]
) -> None:
    expected = alone[name]
    assert any(bad for bad in expected.bad)
    for done in together:
        found = done[name]
        assert found.bad == expected.bad
        assert found.notes == together[0][name].notes
        assert "On rank " in found.notes[0]
        assert "second (sequence" in found.notes[0]
        for key, values in found.trained.items():
            np.testing.assert_allclose(values, expected.trained[key], rtol=1e-12)
