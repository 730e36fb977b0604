"""How many candidates fit on a GPU: the plan against the bytes that the fast step counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lora.config import BaseWeights, LoRAConfig, TrainConfig
from lora.decoder.decoder import Decoder, build_decoder
from lora.device import DeviceChoice
from lora.fast.memory.plan import PlanInputs
from lora.sweep import capacity
from lora.sweep.capacity import RESERVED_FRACTION, fast_stack_bytes, plan_stack_memory
from lora.sweep.grid import Candidate
from tests.fast.memory.conftest import TINY

ROWS, TOKENS, FREE = 2, 64, 50_000_000
CHOICE = DeviceChoice(torch.device("cuda"), torch.bfloat16, "a test")
CANDIDATES = [
    Candidate(k + 1, f"{k + 1:03d}", LoRAConfig(rank=rank), TrainConfig(learning_rate=1e-3))
    for k, rank in enumerate((2, 8, 4))
]


def setting() -> PlanInputs:
    return PlanInputs(
        config=TINY,
        lora=LoRAConfig(rank=8),
        micro_batch_size=ROWS,
        tokens=TOKENS,
        device_type="cuda",
        compute_dtype=torch.bfloat16,
        packed=False,
        learned_fraction=1.0,
        fast=False,
    )


@pytest.fixture
def memory_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], capacity.StackMemory]:
    """Return a function that plans for an empty GPU; `why_not` is why the fast step cannot run."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (FREE, FREE))

    def find(why_not: str | None, *, fast: bool = True, **stored: Any) -> capacity.StackMemory:
        monkeypatch.setattr(capacity, "_why_not_fast", lambda *_: why_not)
        model: Decoder = build_decoder(TINY, 0)
        return plan_stack_memory(
            model, CANDIDATES, ROWS, TOKENS,
            packed=False, learned_fraction=1.0, choice=CHOICE, fast=fast, **stored,
        )  # fmt: skip

    return find


def test_the_fast_step_is_planned_as_it_is_built(
    memory_of: Callable[..., capacity.StackMemory],
) -> None:
    memory = memory_of(None)
    assert memory.n_fit is not None
    assert memory.n_fit > 5

    def line(n: int) -> int:
        return memory.shared_bytes + n * memory.each_bytes

    for n in (1, 2, 5, memory.n_fit):
        held = fast_stack_bytes(setting(), n)
        assert held <= line(n) <= 1.05 * held  # many are evaluated in parts, and hold less
    assert line(memory.n_fit) <= (1 - RESERVED_FRACTION) * FREE < line(memory.n_fit + 1)
    base = 2 * sum(p.numel() for p in build_decoder(TINY, 0).parameters())
    assert memory.shared_bytes >= base


@pytest.mark.parametrize("fast", [True, False])
def test_a_base_in_nf4_is_planned_as_it_is_stored(
    memory_of: Callable[..., capacity.StackMemory], fast: bool
) -> None:
    nf4 = BaseWeights("nf4")
    memory = memory_of(None, fast=fast, base=nf4)
    if fast:
        for n in (1, 2, 5):
            held = fast_stack_bytes(replace(setting(), base=nf4), n)
            assert held <= memory.shared_bytes + n * memory.each_bytes <= 1.05 * held
        assert memory.shared_bytes < memory_of(None).shared_bytes
    else:
        # Unpacked for a moment, and nothing of its values is saved for the backward pass.
        assert memory.each_bytes == pytest.approx(memory_of("x").each_bytes, rel=0.1)


def test_weights_that_a_folder_in_4_bits_leaves_plain_are_planned_so(
    memory_of: Callable[..., capacity.StackMemory],
) -> None:
    nf4, model = BaseWeights("nf4"), build_decoder(TINY, 0)
    packed = {n for n, p in model.named_parameters() if "layers" in n and p.ndim == 2}
    some = {name for name in packed if "q_proj" in name}
    held = [
        memory_of(None, base=nf4, quantised_weights=only).shared_bytes
        for only in (None, frozenset(packed), frozenset(some))
    ]
    assert held[0] == held[1] < held[2]


def test_the_plain_step_is_planned_where_the_fast_one_is_not_taken(
    memory_of: Callable[..., capacity.StackMemory],
) -> None:
    plain, refused, fast = memory_of(None, fast=False), memory_of("dropout"), memory_of(None)
    assert plain == refused
    assert plain.each_bytes != fast.each_bytes
