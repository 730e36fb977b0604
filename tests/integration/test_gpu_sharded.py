"""The step over sharded weights on two GPUs against the same over whole ones, in bf16."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora.config import BaseWeights
from lora.distributed.world import World
from lora.fast.llama.checkpointing import MODES
from lora.fast.sharded.base import ShardedBase
from lora.fast.sharded.gather import CollectiveGather, PulledGather
from lora.fast.sharded.ring import ShardRing, block_unit
from lora.fast.step import FastStep
from lora.kernels.step.jit import HAS_TRITON
from lora.kernels.step.ops import TRITON
from tests.distributed.processes import run_processes
from tests.fast.sharded.models import Case, batch_of, empty_model, rows_of, whole_model

N_GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(N_GPUS < 2, reason=f"needs two CUDA devices, there are {N_GPUS}"),
    pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"),
]
LIMIT_S = 240
N_STEPS = 6
SMALL = Case(
    tied=False, bias=True, n_layers=5, dtype=torch.bfloat16, heads=(8, 2, 64), feed_forward=1536,
    vocabulary=1000, std=0.02,
)  # fmt: skip
"""Gathers take longer than the computation with them: whoever does not wait reads old weights."""
CASES = {
    "bf16": SMALL,
    "bf16, tied, even blocks": replace(SMALL, tied=True, n_layers=4),
    "bf16, one block": replace(SMALL, lora={"layers": (3,)}),
    "bf16, dropout": replace(SMALL, lora={"dropout": 0.2}),
    "fp8": replace(SMALL, base=BaseWeights("fp8")),
    "nf4": replace(SMALL, base=BaseWeights("nf4")),
    "int8": replace(SMALL, base=BaseWeights("int8")),
}
LONG = 2048
"""Tokens with which the computation takes longer than the gathers."""


def _to_gpu(case: Case, device: torch.device) -> tuple[Any, Any]:
    """Return the whole model and the one to be sharded, on the device as a run loads them."""
    whole, empty = whole_model(case, device).to(device), empty_model(case)
    for model in (whole, empty):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(device).float()
    return whole, empty


def _train(step: FastStep, tokens: int) -> list[list[float]]:
    reports: list[Tensor] = []
    for number in range(1, N_STEPS + 1):
        batches = [
            batch_of(10 * number + m, 2, packed=number % 2 == 0, tokens=tokens) for m in range(2)
        ]
        step.launch(batches, 1e-3, number)
        reports.append(step.report.clone())  # the host runs ahead: nothing waits for a step
    return [report.tolist() for report in reports]


def _compare(world: World, name: str, mode: str, tokens: int) -> dict[str, Any]:
    case, device = CASES[name], torch.device("cuda", world.local_rank)
    whole, empty = _to_gpu(case, device)
    settings: dict[str, Any] = {"checkpointing": MODES[mode], "seed": 3}
    expected = _train(FastStep(whole, TRITON, torch.bfloat16, merges=False, **settings), tokens)
    base = ShardedBase(rows_of(case), device, world)
    step = FastStep(empty, TRITON, torch.bfloat16, base=base, **settings)
    found = _train(step, tokens)
    ring = step.network.ring
    assert ring is not None
    assert ring.gather is not None
    kind = ring.gather.name
    weights = _same_weights(ring, whole, empty)
    _copy_trained(whole, empty)  # so that the forwards compute the same, but for rounding
    forward = {kind: _forward_difference(whole, empty, device)}
    ring.gather = CollectiveGather(world, ring.shard)
    forward[ring.gather.name] = _forward_difference(whole, empty, device)
    return {"expected": expected, "found": found, "forward": forward, **weights}


@torch.no_grad()
def _copy_trained(source: Any, target: Any) -> None:
    others = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(others[name])


@torch.no_grad()
def _same_weights(ring: ShardRing, whole: Any, empty: Any) -> dict[str, bool]:
    """Return whether every gathered weight has the bits of the whole model's."""
    same, others = True, dict(whole.named_parameters())
    for layer in range(whole.config.num_hidden_layers):
        ring.enter(block_unit(layer), block_unit(layer + 1))
        for name, parameter in empty.named_parameters():
            if f".layers.{layer}." in name and not parameter.requires_grad:
                same &= torch.equal(_bits(parameter), _bits(others[name]))
    return {"weights": same}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


@torch.no_grad()
def _forward_difference(whole: Any, empty: Any, device: torch.device) -> list[float]:
    """Return the relative difference of the logits of the models' own forwards, several times."""
    whole.eval(), empty.eval()
    differences = []
    for seed in range(4):  # one after the other, so that slots are overwritten while they are used
        batch = batch_of(seed, 2, packed=False, tokens=64).to(device)
        with torch.autocast("cuda", torch.bfloat16):
            one, other = whole(batch.input_ids).float(), empty(batch.input_ids).float()
        differences.append(float((one - other).norm() / one.norm()))
    return differences


PAIRS = [(name, "none", 64) for name in CASES]
PAIRS += [("bf16", mode, 64) for mode in MODES if mode != "none"]
PAIRS += [("fp8", "full", 64), ("bf16", "cheap", LONG), ("fp8", "cheap", LONG)]
PAIRS += [("nf4", "full", 64), ("nf4", "cheap", LONG)]


def _compare_all(world: World) -> list[dict[str, Any]]:
    return [_compare(world, *pair) for pair in PAIRS]


def test_two_gpus_train_as_one_with_all_weights() -> None:
    for found in run_processes(2, _compare_all, timeout_s=LIMIT_S, device_type="cuda"):
        for pair, one in zip(PAIRS, found, strict=True):
            assert one["weights"], pair
            assert max(max(each) for each in one["forward"].values()) < 1e-2, (pair, one["forward"])
            for report, expected in zip(one["found"], one["expected"], strict=True):
                told = pair, one["expected"], one["found"]
                assert report[0] == pytest.approx(expected[0], rel=5e-3), told
                assert report[1] == expected[1], told
                assert report[2] == pytest.approx(expected[2], rel=5e-2), told
                assert report[3] == 1.0, told


def _both_gathers(world: World) -> dict[str, Any]:
    """Return whether pulled and collective gathers bring the same bytes, and how long they take."""
    case, device = replace(SMALL, heads=(32, 8, 64), n_layers=2), torch.device(
        "cuda", world.local_rank
    )  # fmt: skip
    _, empty = _to_gpu(case, device)
    step = FastStep(empty, TRITON, torch.bfloat16, base=ShardedBase(rows_of(case), device, world))
    ring = step.network.ring
    assert ring is not None
    assert ring.gather is not None
    slots, seconds = {}, {}
    for gather in (ring.gather, CollectiveGather(world, ring.shard)):
        slot = torch.zeros_like(ring.slots[0])
        for _ in range(2):
            torch.cuda.synchronize()
            begun_s = time.perf_counter()
            for unit in ring.units:
                gather.gather(unit.spans(), slot, "a unit")
            torch.cuda.synchronize()
            seconds[gather.name] = time.perf_counter() - begun_s
        gather.gather(ring.units[1].spans(), slot, "a unit")
        slots[gather.name] = slot.clone()
    first, *others = slots.values()
    return {
        "kind": type(ring.gather).__name__,
        "same": all(torch.equal(first, other) for other in others),
        "seconds": seconds,
        "can pull": torch.cuda.can_device_access_peer(0, 1),
    }


def test_weights_copied_from_the_peer_are_those_that_a_collective_gathers() -> None:
    for found in run_processes(2, _both_gathers, timeout_s=LIMIT_S, device_type="cuda"):
        assert found["same"], found
        assert (found["kind"] == PulledGather.__name__) == found["can pull"], found
