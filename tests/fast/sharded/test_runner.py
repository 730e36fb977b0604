"""The runner of the sharded step: several processes with a part of the batch and of the weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lora.config import SamplingConfig, TrainConfig
from lora.data.sequences.batches import ordered_batches
from lora.distributed.world import ALONE, World
from lora.fast.llama.checkpointing import MODES
from lora.fast.llama.passes import FastPass
from lora.fast.runner import FastStepRunner
from lora.fast.sharded.base import ShardedBase
from lora.fast.sharded.machines import machine_devices, machine_world
from lora.inference.generate import generate
from tests.distributed.models import (
    Steps,
    cpu_choice,
    random_sequences,
    take_steps,
    train_config,
    trained_copies,
    worst_difference,
)
from tests.distributed.processes import run_processes
from tests.fast.sharded.models import CASES, Case, empty_model, rows_of, whole_model

# Its processes are started once, in one of the workers that share the tests.
pytestmark = pytest.mark.xdist_group("sharded_runner")

CPU = torch.device("cpu")


def _unclipped(batch_size: int, passes: int = 1) -> TrainConfig:
    """Return settings without clipping: the update has the norm in fp32."""
    return train_config(batch_size, passes, max_grad_norm=0.0)


RUNS: dict[str, tuple[Case, TrainConfig, bool]] = {
    "tied": (CASES["tied"], _unclipped(8), True),
    "accumulation": (CASES["untied, biases, four blocks"], _unclipped(10, 2), False),
    "last block": (CASES["last block"], _unclipped(5), True),
    "dropout": (CASES["dropout"], _unclipped(8), True),
    "fp8": (CASES["fp8"], _unclipped(7), True),
}
"""A model, the global batch, and whether it is packed."""
N_STEPS = 2
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def make_runner(
    case: Case, config: TrainConfig, world: World, *, whole: bool = False, **settings: Any
) -> FastStepRunner:
    """Return a runner over sharded weights, or over whole ones."""
    if whole:
        runner = FastStepRunner(whole_model(case), cpu_choice(case.dtype), config, **settings)
    else:
        base = settings.pop("base", ShardedBase(rows_of(case), CPU, world))
        runner = FastStepRunner(
            empty_model(case), cpu_choice(case.dtype), config, world=world, base=base, **settings
        )
    runner.choice = cpu_choice(torch.float32)  # autocast knows no fp64
    return runner


def run_case(world: World, name: str, *, whole: bool = False) -> tuple[Steps, list[list[int]]]:
    """Return what some steps come to, the loss after them, and answers to two prompts."""
    case, config, packing = RUNS[name]
    sequences = random_sequences(packing=packing)
    runner = make_runner(case, config, world, whole=whole)
    done = take_steps(runner, sequences, config, N_STEPS, world)
    size = world.share.largest(3)
    (done.eval_loss,) = runner.evaluate(ordered_batches(sequences, size, share=world.share))
    few = SamplingConfig(max_new_tokens=4)
    answers = generate(runner.step.model, [[1, 2, 3], [4, 5]], few)
    again = take_steps(runner, sequences, config, 1, world)  # after what others used the slots for
    done.losses += again.losses
    done.trained = trained_copies(runner.model)
    return done, answers


def run_on_machines(world: World) -> tuple[Steps, int | None, int]:
    """Return steps of processes that are two to a machine, each of which has all weights."""
    world = replace(world, local_rank=world.rank % 2, local_size=2)
    case, config, packing = RUNS["accumulation"]
    found, own = machine_devices(world), machine_world(world)
    runner = make_runner(case, config, world, base=ShardedBase(rows_of(case), CPU, own))
    done = take_steps(runner, random_sequences(packing=packing), config, N_STEPS, world)
    done.trained = trained_copies(runner.model)
    assert "over 2 processes" in runner.describe()
    assert "on each machine" in runner.describe()
    return done, found, own.rank


def test_machines_that_each_have_all_weights_train_as_one_process(alone: dict[str, Any]) -> None:
    expected = alone["accumulation"][0].losses[:N_STEPS]
    for rank, (done, found, own_rank) in enumerate(run_processes(4, run_on_machines)):
        assert done.losses == pytest.approx(expected, rel=1e-12)
        assert (found, own_rank) == (2, rank % 2)


def _find_machines(world: World) -> list[int | None]:
    by_rank = [(0, 4), (1, 4), (2, 4), (3, 4)], [(0, 3), (1, 3), (2, 3), (0, 1)], [(0, 1)] * 4
    found = []
    for layout in (*by_rank, [(0, 2), (1, 2), (0, 2), (1, 2)]):
        local_rank, local_size = layout[world.rank]
        found.append(machine_devices(replace(world, local_rank=local_rank, local_size=local_size)))
    return found


def test_machines_are_found_where_all_have_as_many_processes() -> None:
    # All on one machine; three and one; one on each; two on each.
    assert run_processes(4, _find_machines) == [[None, None, None, 2]] * 4


def run_out_of_memory(world: World) -> Steps:
    """Return steps of which the first one runs out of memory, in the last process alone."""
    case, config, packing = RUNS["accumulation"]
    runner = make_runner(
        case, config, world, checkpointing=MODES["none"], leaner=lambda: MODES["full"]
    )
    backward, left = FastPass.backward, [world.rank == world.size - 1]

    def failing(self: FastPass, d_hidden: Tensor, *, first: bool) -> None:
        if left.pop() if left else False:
            raise OUT_OF_MEMORY
        backward(self, d_hidden, first=first)

    FastPass.backward = failing  # type: ignore[method-assign]
    try:
        done = take_steps(runner, random_sequences(packing=packing), config, N_STEPS, world)
    finally:
        FastPass.backward = backward  # type: ignore[method-assign]
    assert runner.step.checkpointing == MODES["full"]
    done.trained = trained_copies(runner.model)
    return done


def run_damaged(world: World) -> Steps:
    """Return steps over a base whose embedding of one token is damaged."""
    case, config = replace(CASES["tied"], tied=False), train_config(6)
    read = rows_of(case)

    def damaged(name: str, rows: slice) -> Tensor:
        values = read(name, rows).clone()
        if "embed_tokens" in name and rows.start <= 5 < rows.stop:
            values[5 - rows.start] = torch.nan
        return values

    runner = make_runner(case, config, world, base=ShardedBase(damaged, CPU, world))
    return take_steps(runner, random_sequences(packing=False), config, 3, world)


def run_all(world: World) -> dict[str, Any]:
    """Return all runs of this process."""
    done: dict[str, Any] = {name: run_case(world, name) for name in RUNS}
    return {**done, "memory": run_out_of_memory(world), "damaged": run_damaged(world)}


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[Steps, list[list[int]]]]:
    return {name: run_case(ALONE, name, whole=True) for name in RUNS}


# Three share rows unevenly; steps of two are in test_step.py, and by machines above.
@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 3])
def together(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_processes(request.param, run_all)


@pytest.mark.parametrize("name", RUNS)
def test_steps_are_those_of_one_process_with_all_weights(
    name: str, alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    # The codes of fp8 inputs round: what differs in the last bits may round to the next code.
    bound = 1e-12 if name != "fp8" else 1e-3
    expected, expected_answers = alone[name]
    for process in together:
        done, answers = process[name]
        assert done.n_tokens == expected.n_tokens
        assert worst_difference(done, expected) < bound
        assert done.eval_loss == pytest.approx(expected.eval_loss, rel=bound)
        assert answers == expected_answers


def test_all_processes_have_the_same_bits(together: list[dict[str, Any]]) -> None:
    for name in RUNS:
        (first, _), *others = (process[name] for process in together)
        for other, _ in others:
            assert other.losses == first.losses
            assert other.eval_loss == first.eval_loss
            for key, values in other.trained.items():
                assert np.array_equal(values, first.trained[key]), (name, key)


def test_all_go_leaner_where_one_runs_out_of_memory(
    alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    expected = alone["accumulation"][0].losses[:N_STEPS]
    for process in together:
        assert process["memory"].losses == pytest.approx(expected, rel=1e-12)


def test_a_damaged_weight_is_found_by_all(together: list[dict[str, Any]]) -> None:
    for process in together:
        notes = process["damaged"].notes
        assert notes == together[0]["damaged"].notes
        assert "first in model.embed_tokens (sequence" in notes[0]
