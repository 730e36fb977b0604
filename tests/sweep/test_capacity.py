"""How many candidates fit on a GPU: the fast step's bytes, counted for one and for many."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lora.config import LoRAConfig, TrainConfig
from lora.decoder.decoder import Decoder, build_decoder
from lora.device import DeviceChoice
from lora.fast.memory.plan import Setting
from lora.sweep import capacity
from lora.sweep.capacity import SPARED, fast_stack_bytes, find_room
from lora.sweep.grid import Candidate
from tests.fast.memory.test_plan import TINY

ROWS, TOKENS, FREE = 2, 64, 50_000_000
CHOICE = DeviceChoice(torch.device("cuda"), torch.bfloat16, "a test")
CANDIDATES = [
    Candidate(k + 1, f"{k + 1:03d}", LoRAConfig(rank=rank), TrainConfig(learning_rate=1e-3))
    for k, rank in enumerate((2, 8, 4))
]


def setting() -> Setting:
    return Setting(
        config=TINY,
        lora=LoRAConfig(rank=8),
        rows=ROWS,
        tokens=TOKENS,
        device_type="cuda",
        compute_dtype=torch.bfloat16,
        packed=False,
        learned_fraction=1.0,
        fast=False,
    )


@pytest.fixture
def room_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], capacity.Room]:
    """Plans on a GPU that has nothing on it yet, where `why_not` speaks against the fast step."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (FREE, FREE))

    def find(why_not: str | None, *, fast: bool = True) -> capacity.Room:
        monkeypatch.setattr(capacity, "_why_not_fast", lambda *_: why_not)
        model: Decoder = build_decoder(TINY, 0)
        return find_room(
            model, CANDIDATES, ROWS, TOKENS,
            packed=False, learned_fraction=1.0, choice=CHOICE, fast=fast,
        )  # fmt: skip

    return find


def test_the_fast_step_is_planned_as_it_is_built(
    room_of: Callable[..., capacity.Room],
) -> None:
    room = room_of(None)
    assert room.n_fit is not None
    assert room.n_fit > 5

    def line(n: int) -> int:
        return room.shared_bytes + n * room.each_bytes

    for n in (1, 2, 5, room.n_fit):
        held = fast_stack_bytes(setting(), n)
        assert held <= line(n) <= 1.05 * held  # many are evaluated in parts, and hold less
    assert line(room.n_fit) <= (1 - SPARED) * FREE < line(room.n_fit + 1)
    base = 2 * sum(p.numel() for p in build_decoder(TINY, 0).parameters())
    assert room.shared_bytes >= base


def test_the_plain_step_is_planned_where_the_fast_one_is_not_taken(
    room_of: Callable[..., capacity.Room],
) -> None:
    plain, refused, fast = room_of(None, fast=False), room_of("dropout"), room_of(None)
    assert plain == refused
    assert plain.each_bytes != fast.each_bytes
