"""Memory of one of several devices, with all weights or a share of them, and the choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from lora.config import BaseWeights, LoRAConfig, MemoryConfig
from lora.decoder.config import AttentionConfig, FeedForwardConfig
from lora.decoder.decoder import Decoder, build_empty_decoder
from lora.decoder.sizes import stored_bytes
from lora.errors import ConfigError
from lora.fast.memory.fsdp import GATHERED_BLOCKS, fsdp_weights
from lora.fast.memory.parallel import (
    BLOCKS,
    DOES_NOT_FIT,
    MIN_HIDDEN_TOKENS,
    MIN_LINK_BYTES_PER_S,
    STORED,
    ParallelPlan,
    choose_parallel,
    plan_parallel,
    plan_within,
)
from lora.fast.memory.plan import MemoryPlan, PlanInputs
from lora.fast.memory.planner import NCCL_BYTES, MemoryPlanner
from lora.layers.quantised_model import use_quantised_linears
from tests.fast.memory.conftest import TINY

LORA = LoRAConfig(rank=4)
WIDE = replace(
    TINY,
    hidden_size=2048,
    attention=AttentionConfig(16, 4, 128),
    feed_forward=FeedForwardConfig(8192, "silu"),
    layers=TINY.layers * 4,
    vocab_size=8000,
)
"""Eight blocks with more weights than a step of so many tokens has activations."""
SETTING = PlanInputs(WIDE, LORA, 32, 64, "cuda", torch.bfloat16, devices=4)
BLOCK = 2 * 2048**2 + 2 * 512 * 2048 + 3 * 2048 * 8192
"""Elements of a block's matrices: q and o, k and v, and the feed-forward."""
NORMS = 2 * 2048
CODE_BYTES = {"auto": 2, "fp8": 1, "int8": 1, "nf4": 0.5}
"""Of a weight's value, by how the base is stored."""
TABLE = 8000 * 2048
"""Elements of the embedding, which is the head."""


@cache
def planner(parallel: str = "ddp", **more: object) -> MemoryPlanner:
    return MemoryPlanner(replace(SETTING, parallel=parallel, **more), 0)  # type: ignore[arg-type]


def planned(parallel: str = "ddp", mode: str = "none", **more: object) -> MemoryPlan:
    return planner(parallel, **more).plan(memory=MemoryConfig(mode))  # type: ignore[arg-type]


def built(**more: object) -> Decoder:
    model = build_empty_decoder(replace(WIDE, **more)).bfloat16()  # type: ignore[arg-type]
    return model.requires_grad_(False)


def test_units_of_fsdp_are_the_blocks_and_each_tensor_outside_of_them_once() -> None:
    sharded = fsdp_weights(built())
    assert [unit.n_bytes for unit in sharded.blocks] == [2 * (BLOCK + NORMS)] * 8
    assert [unit.n_bytes for unit in sharded.others] == [2 * TABLE, 2 * 2048]  # tied: once
    untied = fsdp_weights(built(tie_word_embeddings=False))
    assert [unit.n_bytes for unit in untied.others] == [2 * TABLE, 2 * 2048, 2 * TABLE]
    assert sharded.n_bytes == sharded.shard_bytes(1) == 2 * (8 * (BLOCK + NORMS) + TABLE + 2048)
    for kind, code_bytes in CODE_BYTES.items():  # without scales, which are whole everywhere
        model = built()
        use_quantised_linears(model, BaseWeights(kind))  # type: ignore[arg-type]
        codes = round(BLOCK * code_bytes)
        assert {u.n_bytes for u in fsdp_weights(model).blocks} == {codes + 2 * NORMS}


def test_ddp_takes_what_one_device_takes() -> None:
    alone = planner().on_devices(1)
    assert replace(planned(), devices=1, parallel=None) == alone.plan()
    free = 10**11
    assert alone.usable_bytes(free) - planner().usable_bytes(free) == NCCL_BYTES


@pytest.mark.parametrize("kind", CODE_BYTES)
def test_the_fast_step_holds_a_share_and_two_slots_in_every_mode(kind: str) -> None:
    matrices, table = round(8 * BLOCK * CODE_BYTES[kind]), 2 * TABLE
    base = BaseWeights(kind)  # type: ignore[arg-type]
    slots = 2 * max(matrices // 8, table)
    for mode in ("none", "cheap", "full", "full+offload"):
        ddp, fsdp = (planned(kind, mode, base=base) for kind in ("ddp", "fsdp"))
        assert (ddp.step, fsdp.step) == ("fast", "fast")
        spared = (matrices + table) * 3 // 4 - slots
        # Slots have room for the adapter beside each matrix.
        assert ddp.weights - fsdp.weights == pytest.approx(spared, rel=0.02)
        for part in ("gradients", "optimizer", "activations", "loss", "other"):
            assert getattr(ddp, part) == getattr(fsdp, part)
        assert [mode for mode, _ in ddp.leaner_modes] == [mode for mode, _ in fsdp.leaner_modes]


def test_a_plain_step_gathers_blocks_and_tables() -> None:
    ddp, fsdp = (planned(kind, fast=False) for kind in ("ddp", "fsdp"))
    sharded = fsdp_weights(built())
    gathered = GATHERED_BLOCKS * sharded.blocks[0].n_bytes + 2 * (TABLE + 2048)
    assert ddp.weights - fsdp.weights == sharded.n_bytes - sharded.shard_bytes(4) - gathered
    assert (fsdp.step, fsdp.gradients) == ("plain", ddp.gradients)


def test_full_fine_tuning_shards_weights_gradients_and_moments() -> None:
    plan = planned("fsdp", "full", lora=None, micro_batches=2)
    block = BLOCK + NORMS
    parameters = 8 * block + TABLE + 2048
    assert plan.step == "plain"
    assert plan.parameters == plan.trained_parameters == parameters
    assert plan.optimizer == 8 * parameters / 4
    # Beside its share: of a block until they are summed, and of the head until the end.
    assert plan.gradients == parameters + (2 + 4) * block + 2 * TABLE
    assert plan.weights == parameters + 2 * (GATHERED_BLOCKS * block + TABLE + 2048)
    # One micro-batch: gradients come as activations go, so that fewer of them count.
    one = planned("fsdp", "full", lora=None)
    assert one.gradients < plan.gradients
    # No gradient hides the activations: those of few tokens are a part of those of many.
    few = planner("fsdp", lora=None).plan(16)
    assert few.activations == pytest.approx(one.activations / 2, rel=0.2)
    assert one.activations < planned("ddp", lora=None, fast=False).activations / 3


def test_full_fine_tuning_on_gpus_stores_as_many_blocks_as_fit() -> None:
    plans = planner("fsdp", lora=None)
    leanest = plan_within(plans, MemoryConfig(), None)
    assert (leanest.plan.recomputed_blocks, leanest.recomputes) == (8, BLOCKS)
    each = stored_bytes(WIDE, 32 * 64) - 2 * 32 * 64 * 2048  # a block's input is stored anyway
    room = leanest.plan.total + leanest.plan.optimizer // 2  # while the gradients are whole too
    for extra, n_stored in ((0, 0), (3 * each, 3), (100 * each, 8)):
        chosen = plan_within(plans, MemoryConfig("auto", (room + extra) / 1e9), None)
        assert chosen.plan.recomputed_blocks == 8 - n_stored
        assert chosen.plan.total <= room + extra
        assert chosen.recomputes == (STORED if n_stored == 8 else BLOCKS)
    assert planned("fsdp", lora=None, device_type="cpu").recomputed_blocks is None
    # What the user asks for is taken, whatever the budget.
    for mode, n_recomputed in (("none", 0), ("full", 8)):
        for kind in (plans, planner("fsdp", fast=False)):
            assert kind.plan(memory=MemoryConfig(mode, 1e-3)).recomputed_blocks == n_recomputed


@pytest.mark.parametrize("full", [False, True])
def test_a_planner_is_of_any_number_of_devices(full: bool) -> None:
    more = {"lora": None} if full else {}
    four = planned("fsdp", "auto", **more)
    for devices in (2, 8):
        moved = planner("fsdp", **more).on_devices(devices).plan()
        assert moved == planned("fsdp", "auto", devices=devices, **more)
    assert planned("fsdp", "auto", **more) == four  # left as it was


def test_the_largest_batch_of_a_device_is_larger_with_sharded_weights() -> None:
    room = planned().total
    assert planner().largest_micro_batch(room) == 32
    assert planner("fsdp").largest_micro_batch(room) > 32


def choose(gb: float | None, link: Callable[[], float] | None = None) -> ParallelPlan:
    memory = MemoryConfig("auto", gb)
    ddp, fsdp = (plan_within(planner(kind), memory, None) for kind in ("ddp", "fsdp"))
    return choose_parallel(ddp, fsdp, link)


def room_for(kind: str, mode: str) -> float:
    return planned(kind, mode).total / 1e9


def test_ddp_is_taken_where_it_recomputes_no_matmul() -> None:
    for gb in (100.0, room_for("ddp", "none"), room_for("ddp", "cheap")):
        chosen = choose(gb)
        assert (chosen.parallel, chosen.planner.inputs.parallel) == ("ddp", "ddp")
        assert chosen.reason == "4 devices, ddp: all weights fit on each"
        assert chosen.plan.total <= round(gb * 1e9)


@pytest.mark.parametrize(("mode", "what"), [("cheap", "gate and up"), ("full", "whole blocks")])
def test_sharding_is_taken_where_it_saves_recomputation(mode: str, what: str) -> None:
    gb = room_for("ddp", mode) - (0.1 if mode == "cheap" else 0)
    chosen = choose(gb)
    assert chosen.parallel == "fsdp"
    assert f"with all weights on each, {what} would have to be recomputed" in chosen.reason
    assert chosen.plan.total <= round(gb * 1e9)


def test_sharding_is_not_taken_where_the_exchange_would_take_longer() -> None:
    gb, measured = room_for("fsdp", "cheap"), list[float]()

    def link(speed: float) -> Callable[[], float]:
        def measure() -> float:
            measured.append(speed)
            return speed

        return measure

    slow = choose(gb, link(25e9))
    assert slow.parallel == "ddp"
    assert "weights would arrive at 25 GB/s" in slow.reason
    assert choose(gb, link(MIN_LINK_BYTES_PER_S)).parallel == "fsdp"
    assert len(measured) == 2
    choose(100.0, link(25e9))
    assert len(measured) == 2, "it is measured only where it decides"
    few = {"micro_batch_size": MIN_HIDDEN_TOKENS // 64 - 1}
    memory = MemoryConfig("auto", planned("fsdp", "cheap", **few).total / 1e9)
    plans = (plan_within(planner(kind, **few), memory, None) for kind in ("ddp", "fsdp"))
    chosen = choose_parallel(*plans)
    assert chosen.parallel == "ddp"
    assert "fewer than 2,048 tokens" in chosen.reason


def test_sharding_is_taken_where_nothing_else_fits() -> None:
    gb = room_for("fsdp", "full+offload")
    chosen = choose(gb, lambda: 1.0)
    assert chosen.parallel == "fsdp"
    assert f"would take {room_for('ddp', 'full+offload'):.1f} GB of {gb:.1f}" in chosen.reason
    nothing = choose(1e-6)
    assert nothing.recomputes == DOES_NOT_FIT
    assert "neither ddp nor fsdp fits" in nothing.reason


def test_what_was_asked_for_is_taken() -> None:
    for kind in ("ddp", "fsdp"):
        chosen = plan_parallel(SETTING, kind, MemoryConfig(), None)  # type: ignore[arg-type]
        assert (chosen.parallel, chosen.planner.inputs.parallel) == (kind, kind)
        assert chosen.reason == f"4 devices, {kind}: as asked"
    unknown = plan_parallel(SETTING, "auto", MemoryConfig(), None)
    assert (unknown.parallel, "a device is not known" in unknown.reason) == ("ddp", True)


def test_each_machine_has_all_weights_if_they_fit() -> None:
    machines = replace(SETTING, devices=4, machine_devices=2)
    whole, by_two, by_four = (
        planned("fsdp", "full+offload", devices=n).total / 1e9 for n in (1, 2, 4)
    )
    assert whole > by_two > by_four
    asked = {"inputs": machines, "parallel": "fsdp", "free_bytes": None}
    room = plan_parallel(**asked, memory=MemoryConfig("auto", by_two))  # type: ignore[arg-type]
    assert room.planner.inputs.shards == 2
    assert room.plan.total <= by_two * 1e9
    narrow = (by_two + by_four) / 2
    tight = plan_parallel(**asked, memory=MemoryConfig("auto", narrow))  # type: ignore[arg-type]
    assert (tight.planner.inputs.shards, tight.planner.inputs.machine_devices) == (4, None)
    assert tight.plan.total <= narrow * 1e9


def test_alone_there_is_nothing_to_choose() -> None:
    alone = replace(SETTING, devices=1)
    chosen = plan_parallel(alone, "auto", MemoryConfig("auto", 100.0), None)
    assert (chosen.parallel, chosen.reason) == (None, "")
    assert plan_parallel(alone, "ddp", MemoryConfig(), None).parallel is None
    with pytest.raises(ConfigError, match=r"'fsdp' with one process.*--devices N"):
        plan_parallel(alone, "fsdp", MemoryConfig(), None)


def test_the_budget_is_what_a_device_has_free() -> None:
    within = plan_within(planner(), MemoryConfig(), 10**9)
    assert within.memory.memory_gb == planner().usable_bytes(10**9) / 1e9
    assert plan_within(planner(), MemoryConfig("auto", 0.5), 10**9).memory.memory_gb == 0.5
