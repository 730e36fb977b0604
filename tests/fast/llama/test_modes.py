"""Activation checkpointing against none of it, in fp64 on a CPU: losses, parameters, moments."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from lora.adapters.apply import apply_lora
from lora.config import LoRAConfig
from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder
from lora.fast.llama import attention_pass, buffers, checkpointing
from lora.fast.llama.checkpointing import (
    MODES,
    ActivationCheckpointing,
    BlockTensors,
    OffloadedResiduals,
)
from lora.fast.memory.fast_step import LONG_SEQUENCE_TOKENS, FastPlan, fit_memory
from lora.fast.step import FastStep
from lora.kernels.step.ops import PLAIN
from tests.fast.conftest import GEMMA, GRANITE, OLMO, apply_random_lora

POLICIES = {
    **{name: policy for name, policy in MODES.items() if name != "none"},
    "cheap, gate and up of one block": ActivationCheckpointing(
        stores_norms=False, n_stored_gate_up=1
    ),
    "full but one block": ActivationCheckpointing(
        stores_norms=False, n_stored_gate_up=0, n_stored_qkv=1
    ),
    "full but two blocks, one with gate and up": ActivationCheckpointing(
        stores_norms=False, n_stored_gate_up=1, n_stored_qkv=2
    ),
    "full but attention": ActivationCheckpointing(
        stores_norms=False, n_stored_gate_up=0, n_stored_qkv=0, n_stored_attention=3
    ),
    "full but one block and another's attention": ActivationCheckpointing(
        stores_norms=False, n_stored_gate_up=0, n_stored_qkv=1, n_stored_attention=2
    ),
    "full+offload but attention of two": ActivationCheckpointing(
        stores_norms=False,
        n_stored_gate_up=0,
        n_stored_qkv=0,
        offloads_residuals=True,
        n_stored_attention=2,
    ),
}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "tied": ({}, {"rank_pattern": {"k_proj": 2}}),
    "untied, biases": ({"tied": False, "bias": True}, {}),
    "window": ({"window": 4}, {}),
    "normed heads": ({"qk_norm": "head"}, {"layers": (1, 2)}),
    "last block": ({}, {"layers": (2,)}),
    "Gemma": (GEMMA, {"layers": (1, 2)}),
    "Gemma, full": (GEMMA, None),
    "Granite": (GRANITE, {"layers": (1, 2)}),
    "OLMo, dropout": (OLMO, {"dropout": 0.2}),
    "two targets": ({}, {"targets": ("q_proj", "down_proj")}),
    "dropout": ({}, {"dropout": 0.3}),
    "full fine-tuning": ({"tied": False, "bias": True}, None),
}
WAYS = [
    pytest.param(
        *(name, packed, merges),
        marks=[] if packed == merges or name in ("tied", "Gemma, full") else pytest.mark.slow,
    )
    for name in SETTINGS
    for packed in (True, False)
    for merges in (True, False)
]
"""Settings, whether sequences are packed, whether LoRA is merged and attention our own.

The two decide apart: that two settings go all four ways is enough among the quick tests."""


class LateResiduals(OffloadedResiduals):
    """Copies made as late as the waits allow, in the order in which they were begun.

    On a CPU copies are made when they are begun, the earliest that a stream could make them.
    """

    waits_for_room, waits_for_fetched = True, True

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.begun: list[tuple[int, bool]] = []

    def reserve_slot(self, index: int) -> None:
        if self.waits_for_room:
            super().reserve_slot(index)

    def fetch(self, index: int, lowest: int) -> None:
        if self.waits_for_fetched:
            super().fetch(index, lowest)
        elif lowest <= index - 1 < len(self.host):
            self._copy(index - 1, to_host=False)

    def join(self) -> None:
        self._make(len(self.begun))
        super().join()

    def _copy(self, index: int, *, to_host: bool) -> None:
        self.begun.append((index, to_host))

    def _wait(self, index: int) -> None:
        indices = [begun for begun, _ in self.begun]
        if index in indices:
            self._make(len(indices) - indices[::-1].index(index))  # up to its newest copy

    def _make(self, n_copies: int) -> None:
        for index, to_host in self.begun[:n_copies]:
            self._copy_chunks(index, to_host=to_host)
        del self.begun[:n_copies]


class NoRoomResiduals(LateResiduals):
    """A fault: a residual is overwritten before it is on the host."""

    waits_for_room = False


class StaleResiduals(LateResiduals):
    """A fault: a residual is read before it is back on the device."""

    waits_for_fetched = False


def adapt(model: Decoder, settings: dict[str, Any] | None) -> Decoder:
    """Return `model` with LoRA of these settings; None: all of it trains."""
    if settings is None:
        return model.requires_grad_(True)
    return apply_random_lora(model, **settings)


def train(
    model: Decoder, steps: Sequence[Sequence[Batch]], **settings: Any
) -> tuple[list[list[float]], list[torch.Tensor]]:
    """Return the reports of all steps, and parameters and moments after them."""
    step = FastStep(model, PLAIN, torch.float64, weight_decay=0.1, seed=5, **settings)
    reports = []
    for number, batches in enumerate(steps, 1):
        step.launch(batches, 1e-2, number)
        reports.append(step.report.tolist())
    return reports, [step.flat.values, step.flat.mean, step.flat.square]


@pytest.mark.parametrize(("name", "packed", "merges"), WAYS)
def test_all_modes_compute_what_mode_none_does(
    tiny_decoder: Callable[..., Decoder],
    make_batch: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    packed: bool,
    merges: bool,
) -> None:
    monkeypatch.setattr(
        buffers, "FEED_FORWARD_CHUNK_TOKENS", 13
    )  # feed-forwards in three parts, one shorter
    monkeypatch.setattr(buffers, "MAX_LOGITS_ELEMENTS_RECOMPUTING", 97 * 20)
    monkeypatch.setattr(checkpointing, "HOST_CHUNK_BYTES", 3000)
    sizes, settings = SETTINGS[name]
    base = adapt(tiny_decoder(**sizes), settings)
    n_micro = 2 if packed else 1
    steps = [
        [make_batch(10 * number + index, packed=packed) for index in range(n_micro)]
        for number in range(3)
    ]
    ways = {"merges": merges, "own_attention": merges}
    reports, values = train(copy.deepcopy(base), steps, **ways)
    assert reports[0][0] != reports[1][0]
    for policy_name, policy in POLICIES.items():
        own_reports, own_values = train(copy.deepcopy(base), steps, checkpointing=policy, **ways)
        for own, expected in zip(own_reports, reports, strict=True):
            assert own == pytest.approx(expected, rel=1e-6), policy_name  # reports are fp32
        for own_value, value in zip(own_values, values, strict=True):
            assert (own_value - value).norm() <= 1e-12 * value.norm(), policy_name


@pytest.mark.parametrize("name", ["tied", "last block"])
def test_copies_may_be_as_late_as_the_waits_allow(
    tiny_decoder: Callable[..., Decoder],
    make_batch: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """The same bits with late copies; others where a wait is missing, so that the test can fail."""
    sizes, settings = SETTINGS[name]
    base = adapt(tiny_decoder(**sizes), settings)
    steps = [
        [make_batch(2 * number + index, packed=True) for index in range(2)] for number in (0, 1)
    ]

    def values(residuals: type[OffloadedResiduals]) -> torch.Tensor:
        monkeypatch.setattr(buffers, "OffloadedResiduals", residuals)
        return train(copy.deepcopy(base), steps, checkpointing=MODES["full+offload"])[1][0]

    expected = values(OffloadedResiduals)
    assert torch.equal(values(LateResiduals), expected)
    if name == "tied":  # the last block alone reads nothing that was away
        assert not torch.equal(values(NoRoomResiduals), expected)
        assert not torch.equal(values(StaleResiduals), expected)


@pytest.mark.parametrize("residuals", [OffloadedResiduals, LateResiduals])
def test_residuals_come_back_from_the_host(
    monkeypatch: pytest.MonkeyPatch, residuals: type[OffloadedResiduals]
) -> None:
    """Through six blocks, in the order of a pass: what is fetched is what was offloaded."""
    monkeypatch.setattr(checkpointing, "HOST_CHUNK_BYTES", 200)
    stored = residuals(torch.empty(0, dtype=torch.float64), 7, 11, 5)
    assert len(stored.host) == 4
    assert stored.host_bytes == 4 * 11 * 5 * 8
    for index in range(7):
        stored.reserve_slot(index)
        stored[index].fill_(index)
        if index < 6:
            stored.offload(index)
    for index in reversed(range(6)):
        stored.fetch(index, 0)
        assert bool((stored[index] == index).all())
        assert bool((stored[index + 1] == (6 if index == 5 else -index - 1)).all())
        stored[index].fill_(-index)  # the gradient
    stored.join()


def test_the_last_blocks_store_tensors_of_their_own() -> None:
    tensors = BlockTensors(torch.empty(0), 4, 2, 6, 3, 5)
    addresses = [tensors[layer].data_ptr() for layer in range(4)]
    assert addresses[0] == addresses[1] != addresses[2] != addresses[3]
    assert [tensors.is_stored(layer) for layer in range(4)] == [False, False, True, True]
    assert tensors.chunk(3, slice(2, 5)).data_ptr() == tensors[3][2:5].data_ptr()
    assert tensors.chunk(0, slice(2, 5)).data_ptr() == tensors[0].data_ptr()
    assert BlockTensors(torch.empty(0), 4, 4, 6, 3, 5).scratch.numel() == 0


def test_modes_hold_less_and_less(tiny_decoder: Callable[..., Decoder]) -> None:
    model = apply_lora(tiny_decoder(), LoRAConfig(rank=3)).to("meta")
    step = FastStep(model, PLAIN, torch.bfloat16)  # type: ignore[arg-type]

    def held(policy: ActivationCheckpointing) -> int:
        held_by = step.network.buffers(2, 4096, policy)
        storages = {s._cdata: s.nbytes() for s in held_by.storages()}
        return sum(storages.values())

    sizes = [held(policy) for policy in MODES.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert held(MODES["full"]) < held(POLICIES["full but one block"]) < held(MODES["cheap"])
    assert held(POLICIES["cheap, gate and up of one block"]) < held(MODES["cheap"])


@pytest.mark.parametrize("policy", [MODES["full"], MODES["full+offload"]])
def test_stored_attention_is_not_recomputed(
    tiny_decoder: Callable[..., Decoder],
    make_batch: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
    policy: ActivationCheckpointing,
) -> None:
    computed: list[int] = []
    attend = attention_pass.attend_packed_plain

    def count(*sizes: Any) -> Any:
        computed.append(1)
        return attend(*sizes)

    monkeypatch.setattr(attention_pass, "attend_packed_plain", count)
    # Three blocks forward; in backward the last one's values are still in scratch.
    for attention_out, expected in enumerate((5, 5, 4, 3)):
        computed.clear()
        model, own = adapt(tiny_decoder(), {}), replace(policy, n_stored_attention=attention_out)
        train(model, [[make_batch(0, packed=True)]], checkpointing=own, own_attention=False)
        assert len(computed) == expected


def test_long_sequences_store_attention_before_the_rest_of_a_block(
    tiny_decoder: Callable[..., Decoder],
) -> None:
    def chosen(tokens: int, policy: ActivationCheckpointing) -> ActivationCheckpointing:
        """Return what is chosen where the budget is what `policy` needs."""
        model = apply_lora(tiny_decoder(), LoRAConfig(rank=3)).to("meta")
        plan = FastPlan(model, 1, tokens)  # type: ignore[arg-type]
        return fit_memory(plan, "auto", plan.memory(policy).total).checkpointing

    full, offload = MODES["full"], MODES["full+offload"]
    for policy in (
        MODES["none"],
        replace(full, n_stored_qkv=1, n_stored_attention=3),
        replace(full, n_stored_attention=3),
        replace(offload, n_stored_attention=1),
        offload,
    ):
        assert chosen(LONG_SEQUENCE_TOKENS, policy) == policy
    for policy in (replace(full, n_stored_qkv=1), full, offload):
        assert chosen(LONG_SEQUENCE_TOKENS // 2, policy) == policy
