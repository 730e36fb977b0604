"""Every memory mode against mode none, in fp64 on a CPU: losses, parameters and moments."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from lora.adapters.apply import apply_lora, lora_layers
from lora.config import LoRAConfig
from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder
from lora.fast.llama import blocks, buffers, passes
from lora.fast.llama.blocks import MODES, Blocks, Keep, OffloadedResiduals
from lora.fast.memory.fast_step import LONG_TOKENS, FastPlan, fit_memory
from lora.fast.step import FastStep
from lora.kernels.step.ops import PLAIN

KEEPS = {
    **{name: keep for name, keep in MODES.items() if name != "none"},
    "cheap, gate and up of one block": Keep(norms=False, gate_up=1),
    "full but one block": Keep(norms=False, gate_up=0, inner=1),
    "full but two blocks, one with gate and up": Keep(norms=False, gate_up=1, inner=2),
    "full but attention": Keep(norms=False, gate_up=0, inner=0, attended=3),
    "full but one block and another's attention": Keep(norms=False, gate_up=0, inner=1, attended=2),
    "full+offload but attention of two": Keep(
        norms=False, gate_up=0, inner=0, offloads=True, attended=2
    ),
}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "tied": ({}, {"rank_pattern": {"k_proj": 2}}),
    "untied, biases": ({"tied": False, "bias": True}, {}),
    "window": ({"window": 4}, {}),
    "last block": ({}, {"layers": (2,)}),
    "two targets": ({}, {"targets": ("q_proj", "down_proj")}),
    "dropout": ({}, {"dropout": 0.3}),
    "full fine-tuning": ({"tied": False, "bias": True}, None),
}


class LateResiduals(OffloadedResiduals):
    """Copies as late as the waits allow, in the order in which they were begun.

    On a CPU copies are made when they are begun, the earliest that a stream could make them.
    """

    waits_for_room, waits_for_fetched = True, True

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.begun: list[tuple[int, bool]] = []

    def make_room(self, place: int) -> None:
        if self.waits_for_room:
            super().make_room(place)

    def fetch(self, place: int, least: int) -> None:
        if self.waits_for_fetched:
            super().fetch(place, least)
        elif least <= place - 1 < len(self.host):
            self._copy(place - 1, to_host=False)

    def join(self) -> None:
        self._make(len(self.begun))
        super().join()

    def _copy(self, place: int, *, to_host: bool) -> None:
        self.begun.append((place, to_host))

    def _wait(self, place: int) -> None:
        places = [begun for begun, _ in self.begun]
        if place in places:
            self._make(len(places) - places[::-1].index(place))  # up to its newest copy

    def _make(self, n_copies: int) -> None:
        for place, to_host in self.begun[:n_copies]:
            self._copy_pieces(place, to_host=to_host)
        del self.begun[:n_copies]


class NoRoomResiduals(LateResiduals):
    """A residual is overwritten before it has been stored."""

    waits_for_room = False


class StaleResiduals(LateResiduals):
    """A residual is read before it is back."""

    waits_for_fetched = False


def adapt(model: Decoder, settings: dict[str, Any] | None) -> Decoder:
    if settings is None:
        return model.requires_grad_(True)
    apply_lora(model, LoRAConfig(**{"rank": 3, "alpha": 6.0, "init_seed": 0, **settings}))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.copy_(0.3 * torch.randn(layer.lora_B.shape, generator=draw))
    return model


def train(
    model: Decoder, steps: Sequence[Sequence[Batch]], **settings: Any
) -> tuple[list[list[float]], list[torch.Tensor]]:
    """Return the reports of all steps, and values and moments after them."""
    step = FastStep(model, PLAIN, torch.float64, weight_decay=0.1, seed=5, **settings)
    reports = []
    for number, batches in enumerate(steps, 1):
        step.launch(batches, 1e-2, number)
        reports.append(step.report.tolist())
    return reports, [step.flat.values, step.flat.mean, step.flat.square]


@pytest.mark.parametrize("merges", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_all_modes_are_mode_none(
    tiny_decoder: Callable[..., Decoder],
    make_batch: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    packed: bool,
    merges: bool,
) -> None:
    monkeypatch.setattr(buffers, "PART_TOKENS", 13)  # feed-forwards in three parts, one shorter
    monkeypatch.setattr(buffers, "LEAN_LOGITS_ELEMENTS", 97 * 20)
    monkeypatch.setattr(blocks, "HOST_PIECE_BYTES", 3000)
    sizes, settings = SETTINGS[name]
    base = adapt(tiny_decoder(**sizes), settings)
    n_micro = 2 if packed else 1
    steps = [
        [make_batch(10 * number + place, packed=packed) for place in range(n_micro)]
        for number in range(3)
    ]
    ways = {"merges": merges, "own_attention": merges}
    reports, values = train(copy.deepcopy(base), steps, **ways)
    assert reports[0][0] != reports[1][0]
    for keep_name, keep in KEEPS.items():
        own_reports, own_values = train(copy.deepcopy(base), steps, keep=keep, **ways)
        for own, expected in zip(own_reports, reports, strict=True):
            assert own == pytest.approx(expected, rel=1e-6), keep_name  # reports are fp32
        for own_value, value in zip(own_values, values, strict=True):
            assert (own_value - value).norm() <= 1e-12 * value.norm(), keep_name


@pytest.mark.parametrize("name", ["tied", "last block"])
def test_copies_may_be_as_late_as_the_waits_allow(
    tiny_decoder: Callable[..., Decoder],
    make_batch: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """The same bits with late copies; others if a wait is left out, so that this would show."""
    sizes, settings = SETTINGS[name]
    base = adapt(tiny_decoder(**sizes), settings)
    steps = [
        [make_batch(2 * number + place, packed=True) for place in range(2)] for number in (0, 1)
    ]

    def values(residuals: type[OffloadedResiduals]) -> torch.Tensor:
        monkeypatch.setattr(buffers, "OffloadedResiduals", residuals)
        return train(copy.deepcopy(base), steps, keep=MODES["full+offload"])[1][0]

    expected = values(OffloadedResiduals)
    assert torch.equal(values(LateResiduals), expected)
    if name == "tied":  # the last block alone reads nothing that was away
        assert not torch.equal(values(NoRoomResiduals), expected)
        assert not torch.equal(values(StaleResiduals), expected)


@pytest.mark.parametrize("residuals", [OffloadedResiduals, LateResiduals])
def test_residuals_come_back_from_the_host(
    monkeypatch: pytest.MonkeyPatch, residuals: type[OffloadedResiduals]
) -> None:
    """Through six blocks as a pass does it: what is fetched is what was stored."""
    monkeypatch.setattr(blocks, "HOST_PIECE_BYTES", 200)
    kept = residuals(torch.empty(0, dtype=torch.float64), 7, 11, 5)
    assert len(kept.host) == 4
    assert kept.host_bytes == 4 * 11 * 5 * 8
    for place in range(7):
        kept.make_room(place)
        kept[place].fill_(place)
        if place < 6:
            kept.store(place)
    for place in reversed(range(6)):
        kept.fetch(place, 0)
        assert bool((kept[place] == place).all())
        assert bool((kept[place + 1] == (6 if place == 5 else -place - 1)).all())
        kept[place].fill_(-place)  # the gradient
    kept.join()


def test_the_last_blocks_have_tensors_of_their_own() -> None:
    kept = Blocks(torch.empty(0), 4, 2, 6, 3, 5)
    places = [kept[layer].data_ptr() for layer in range(4)]
    assert places[0] == places[1] != places[2] != places[3]
    assert [kept.stays(layer) for layer in range(4)] == [False, False, True, True]
    assert kept.part(3, slice(2, 5)).data_ptr() == kept[3][2:5].data_ptr()
    assert kept.part(0, slice(2, 5)).data_ptr() == kept[0].data_ptr()
    assert Blocks(torch.empty(0), 4, 4, 6, 3, 5).shared.numel() == 0


def test_modes_hold_less_and_less(tiny_decoder: Callable[..., Decoder]) -> None:
    model = apply_lora(tiny_decoder(), LoRAConfig(rank=3)).to("meta")
    step = FastStep(model, PLAIN, torch.bfloat16)  # type: ignore[arg-type]

    def held(keep: Keep) -> int:
        kept = step.network.buffers(2, 4096, keep)
        storages = {s._cdata: s.nbytes() for s in kept.storages()}
        return sum(storages.values())

    sizes = [held(keep) for keep in MODES.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert held(MODES["full"]) < held(KEEPS["full but one block"]) < held(MODES["cheap"])
    assert held(KEEPS["cheap, gate and up of one block"]) < held(MODES["cheap"])


@pytest.mark.parametrize("keep", [MODES["full"], MODES["full+offload"]])
def test_attention_that_stays_is_not_computed_again(
    tiny_decoder: Callable[..., Decoder],
    make_batch: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
    keep: Keep,
) -> None:
    computed: list[int] = []
    attend = passes.attend_documents_plain

    def count(*sizes: Any) -> Any:
        computed.append(1)
        return attend(*sizes)

    monkeypatch.setattr(passes, "attend_documents_plain", count)
    # Three blocks forward; the last one's values are still there on the way back.
    for attended, expected in enumerate((5, 5, 4, 3)):
        computed.clear()
        model, own = adapt(tiny_decoder(), {}), replace(keep, attended=attended)
        train(model, [[make_batch(0, packed=True)]], keep=own, own_attention=False)
        assert len(computed) == expected


def test_long_rows_keep_attention_before_the_rest_of_a_block(
    tiny_decoder: Callable[..., Decoder],
) -> None:
    def chosen(tokens: int, keep: Keep) -> Keep:
        """Return what is chosen where the room is what `keep` needs."""
        model = apply_lora(tiny_decoder(), LoRAConfig(rank=3)).to("meta")
        plan = FastPlan(model, 1, tokens)  # type: ignore[arg-type]
        return fit_memory(plan, "auto", plan.memory(keep).total).keep

    full, offload = MODES["full"], MODES["full+offload"]
    for keep in (
        MODES["none"],
        replace(full, inner=1, attended=3),
        replace(full, attended=3),
        replace(offload, attended=1),
        offload,
    ):
        assert chosen(LONG_TOKENS, keep) == keep
    for keep in (replace(full, inner=1), full, offload):
        assert chosen(LONG_TOKENS // 2, keep) == keep
