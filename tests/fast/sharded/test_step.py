"""The step over sharded weights against the one that has them all, in fp64 on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from lora.config import SamplingConfig
from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder
from lora.distributed.world import ALONE, World
from lora.errors import ModelError
from lora.fast.llama.checkpointing import MODES
from lora.fast.memory.fast_step import USABLE_SHARDED_FRACTION, FastPlan
from lora.fast.sharded.base import ShardedBase
from lora.fast.sharded.gather import CollectiveGather
from lora.fast.sharded.layout import Span
from lora.fast.sharded.ring import N_SLOTS
from lora.fast.step import FastStep
from lora.inference.generate import generate
from lora.kernels.step.ops import PLAIN
from tests.distributed.processes import run_processes
from tests.fast.sharded.models import CASES, Case, batch_of, empty_model, rows_of, whole_model

CPU = torch.device("cpu")
STEPS = [[batch_of(10 * n + m, 2, packed=n == 1) for m in range(2)] for n in range(3)]
"""Micro-batches of three steps; one step's are packed."""


def train(model: Decoder, mode: str, base: ShardedBase | None) -> tuple[FastStep, list[Any]]:
    """Return the step and its reports after three steps."""
    step = FastStep(
        model, PLAIN, torch.float64, weight_decay=0.1, seed=5, merges=False,
        checkpointing=MODES[mode], base=base,
    )  # fmt: skip
    reports = []
    for number, batches in enumerate(STEPS, 1):
        step.launch(batches, 1e-2, number)
        reports.append(step.report.tolist())
    return step, reports


def used(model: Decoder, batch: Batch) -> list[Any]:
    """Return logits of the model's own forward, and a greedy answer."""
    model.eval()
    with torch.no_grad():
        logits = model(
            batch.input_ids, position_ids=batch.position_ids, document_ids=batch.document_ids
        )
    answers = generate(model, [[1, 2, 3], [4, 5]], SamplingConfig(max_new_tokens=4))
    model.train()
    return [logits, answers]


def check(name: str, mode: str, world: World) -> None:
    case = CASES[name]
    whole, expected = train(whole_model(case), mode, None)
    base = ShardedBase(rows_of(case), CPU, world)
    step, reports = train(empty_model(case), mode, base)
    assert reports == expected, (name, mode)
    for one, other in (
        (step.flat.values, whole.flat.values),
        (step.flat.mean, whole.flat.mean),
        (step.flat.square, whole.flat.square),
    ):
        # The same matmuls over the same values: not a bit differs.
        assert torch.equal(one, other), (name, mode)
    batch = batch_of(99, 3, packed=True)
    (logits, answers), (own_logits, own_answers) = used(whole.model, batch), used(step.model, batch)
    assert torch.equal(logits, own_logits)
    assert answers == own_answers
    # An evaluation in between leaves the slots to the next step as it needs them.
    for one_step in (whole, step):
        one_step.launch(STEPS[0], 1e-2, 4)
    assert step.report.tolist() == whole.report.tolist()


PAIRS = [*((name, "full") for name in CASES)]
PAIRS += [(name, mode) for name in ("fp8", "nf4", "int8") for mode in MODES]
PAIRS += [("untied, biases, four blocks", mode) for mode in MODES if mode != "full"]


@pytest.mark.parametrize(("name", "mode"), dict.fromkeys(PAIRS))
def test_a_ring_of_one_process_computes_what_whole_weights_do(name: str, mode: str) -> None:
    check(name, mode, ALONE)


def _check_all(world: World, pairs: list[tuple[str, str]]) -> bool:
    for name, mode in pairs:
        check(name, mode, world)
    return True


@pytest.mark.parametrize(
    ("size", "pairs"),
    [
        (2, [("tied", "none"), ("untied, biases, four blocks", "cheap"), ("fp8", "full+offload")]),
        (3, [("middle block", "full"), ("fp8, biases, two targets, dropout", "cheap")]),
        (
            3,
            [
                ("rows of tied tables, norms", "cheap"),
                ("nf4", "full"),
                ("nf4 in the files", "none"),
            ],
        ),
        (2, [("nf4, four blocks, two targets", "cheap"), ("int8", "none")]),
    ],
)
def test_sharded_steps_equal_the_whole_ones(size: int, pairs: list[tuple[str, str]]) -> None:
    assert run_processes(size, _check_all, pairs) == [True] * size


def _count_bytes(world: World) -> dict[str, int]:
    case = CASES["untied, biases, four blocks"]
    reads: dict[str, int] = {}
    read = rows_of(case)

    def counted(name: str, rows: slice) -> torch.Tensor:
        values = read(name, rows)
        reads[name] = reads.get(name, 0) + values.numel()
        return values

    model = empty_model(case)
    step = FastStep(model, PLAIN, torch.float64, base=ShardedBase(counted, CPU, world))
    ring = step.network.ring
    assert ring is not None
    step.launch(STEPS[0], 1e-2)
    frozen = [p for p in model.parameters() if not p.requires_grad and p.ndim == 2]
    storages = {p.untyped_storage().data_ptr() for p in frozen}
    assert storages == {slot.untyped_storage().data_ptr() for slot in ring.slots}
    return {
        "read": sum(n for name, n in reads.items() if model.get_parameter(name).ndim == 2),
        "all": sum(p.numel() for p in frozen),
        "shard": ring.shard.nbytes,
        "slots": sum(slot.nbytes for slot in ring.slots),
        "largest unit": max(unit.slot_bytes for unit in ring.units),
        "with LoRA's columns": sum(unit.slot_bytes for unit in ring.units),
    }


@pytest.mark.parametrize("size", [2, 3])
def test_no_process_holds_more_than_its_shard_and_two_slots(size: int) -> None:
    found = run_processes(size, _count_bytes)
    # Every row is read by one process.
    assert sum(one["read"] for one in found) == found[0]["all"]
    for one in found:
        assert one["slots"] == N_SLOTS * one["largest unit"]
        # Rows come in whole numbers, and matrices begin at multiples of 256 bytes.
        assert one["shard"] < 1.25 * one["with LoRA's columns"] / size


def _train_damaged(world: World) -> str:
    case = CASES["fp8"]
    read = rows_of(case)

    def damaged(name: str, rows: slice) -> torch.Tensor:
        values = read(name, rows).clone()
        if name.endswith("1.mlp.up_proj.weight") and rows.start == 0:
            values[0, 0] = torch.inf  # a row of the first process alone
        return values

    with pytest.raises(ModelError) as caught:
        FastStep(empty_model(case), PLAIN, torch.float64, base=ShardedBase(damaged, CPU, world))
    return str(caught.value)


def test_damaged_weights_are_told_by_all_processes() -> None:
    first, second = run_processes(2, _train_damaged)
    assert first == second
    assert "model.layers.1.mlp.up_proj.weight to fp8" in first
    assert "rows 0" in first


def _train_cut_off(world: World, ending: str) -> str:
    case = CASES["tied"]
    read = rows_of(case)

    def cut(name: str, rows: slice) -> torch.Tensor:
        if world.rank == 1 and name.endswith(ending):
            raise ModelError(f"Cannot read {name}: the file ends early.")
        return read(name, rows)

    with pytest.raises(ModelError) as caught:
        FastStep(empty_model(case), PLAIN, torch.float64, base=ShardedBase(cut, CPU, world))
    return str(caught.value)


def _train_cut_offs(world: World) -> list[str]:
    return [_train_cut_off(world, ending) for ending in ("norm.weight", "2.mlp.down_proj.weight")]


def test_rows_that_one_process_cannot_read_end_all() -> None:
    first, second = run_processes(2, _train_cut_offs)
    assert first == second
    assert first[1] == "Cannot read model.layers.2.mlp.down_proj.weight: the file ends early."


def test_gradients_through_the_models_own_forward_are_refused() -> None:
    case = CASES["tied"]
    model = empty_model(case)
    FastStep(model, PLAIN, torch.float64, base=ShardedBase(rows_of(case), CPU))
    with pytest.raises(ModelError, match="no_grad"):
        model(STEPS[0][0].input_ids)


class FailingGather(CollectiveGather):
    """Notes what it has gathered; one call runs out of memory before it gathers anything."""

    def __init__(self, shard: torch.Tensor, failing_call: int | None) -> None:
        super().__init__(ALONE, shard)
        self.failing_call, self.gathered = failing_call, list[str]()

    def gather(self, spans: Sequence[Span], slot: torch.Tensor, what: str) -> None:
        if len(self.gathered) == self.failing_call:
            self.failing_call = None
            raise torch.OutOfMemoryError("CUDA out of memory.")
        super().gather(spans, slot, what)
        self.gathered.append(what)


def _gathered(failing_call: int | None) -> list[str]:
    """Return what a process gathers in a step, maybe after a gather that runs out of memory."""
    case = CASES["untied, biases, four blocks"]
    step = FastStep(empty_model(case), PLAIN, torch.float64, base=ShardedBase(rows_of(case), CPU))
    ring = step.network.ring
    assert ring is not None
    ring.gather = noted = FailingGather(ring.shard, failing_call)
    with pytest.raises(torch.OutOfMemoryError) if failing_call is not None else nullcontext():
        step.launch(STEPS[0], 1e-2)
    step.network.catch_up()
    return noted.gathered


def test_a_process_out_of_memory_gathers_what_the_others_do() -> None:
    whole = _gathered(None)
    assert len(whole) > 10
    for failing_call in (0, 1, 5, len(whole) - 1):
        assert _gathered(failing_call) == whole, failing_call


def test_weights_that_are_stored_wider_are_rounded_as_one_process_does() -> None:
    case = replace(CASES["fp8"], dtype=torch.float32)
    read = rows_of(case)
    step = FastStep(
        empty_model(case), PLAIN, torch.float32,
        base=ShardedBase(lambda name, rows: read(name, rows).double(), CPU),
    )  # fmt: skip
    whole = FastStep(whole_model(case), PLAIN, torch.float32, merges=False)
    for one in (step, whole):
        one.launch(STEPS[0], 1e-2)
    assert step.report.tolist() == whole.report.tolist()


def test_a_plan_counts_a_shard_and_two_slots() -> None:
    case = Case(tied=False, dtype=torch.bfloat16)
    plans = [FastPlan(empty_model(case), 2, 12, shards=size) for size in (1, 2, 4)]
    weights = [plan.memory(MODES["none"]).weights for plan in plans]
    rings = [plan.step.network.ring for plan in plans]
    for ring, total in zip(rings, weights, strict=True):
        assert ring is not None
        slots = N_SLOTS * max(unit.slot_bytes for unit in ring.units)
        assert total > ring.held_bytes == ring.shard.nbytes + slots
    # Only what is not read into its final place leaves memory in pieces.
    assert all(plan.loaded_bytes < 0.5 * total for plan, total in zip(plans, weights, strict=True))
    assert {plan.usable_fraction for plan in plans} == {USABLE_SHARDED_FRACTION}
    one, _, four = (ring.shard.nbytes for ring in rings if ring is not None)
    assert four < 0.3 * one
