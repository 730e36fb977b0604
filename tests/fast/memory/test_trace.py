"""Traces of a few blocks against traces of all of them, and how many traces a plan takes."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lora.adapters.apply import apply_lora
from lora.config import BaseWeights, LoRAConfig, MemoryConfig
from lora.decoder.config import AttentionConfig, DecoderConfig, LayerConfig, RopeConfig
from lora.decoder.decoder import Decoder, build_empty_decoder
from lora.fast.memory import traces as traces_module
from lora.fast.memory.plan import PlanInputs
from lora.fast.memory.planner import MemoryPlanner
from lora.fast.memory.sections import block_kinds, representatives
from lora.fast.memory.trace import StepTracer
from lora.layers.quantised_model import use_quantised_linears
from tests.fast.memory.conftest import TINY

TOLERANCE = 0.001
"""Of the peak: blocks that follow a block of another kind may free a small tensor later."""
GLOBAL = LayerConfig(RopeConfig(1e4), None, 8**-0.5)
LOCAL = LayerConfig(RopeConfig(1e3), 16, 8**-0.5)
LLAMA = replace(TINY, vocab_size=7000, max_position_embeddings=2048, layers=(GLOBAL,) * 7)
GEMMA = replace(
    LLAMA,
    family="gemma3_text",
    block="sandwich",
    vocab_size=300,
    attention=AttentionConfig(4, 2, 8, qk_norm="head"),
    layers=(LOCAL, LOCAL, LOCAL, GLOBAL) * 2,
)
LORA = LoRAConfig(rank=4)
FIRST_TRAINED = LoRAConfig(rank=4, layers=(2, 4))
WITH_EMBEDDING = LoRAConfig(rank=4, modules_to_save=("embed_tokens",))


def adapted(config: DecoderConfig, lora: LoRAConfig | None, *, fp8: bool = False) -> Decoder:
    model = build_empty_decoder(config)
    if lora is None:
        return model.requires_grad_(True)
    if fp8:
        use_quantised_linears(model, BaseWeights("fp8"))
    return apply_lora(model, lora)  # type: ignore[return-value]


def kinds(model: Decoder) -> list[Hashable]:
    return block_kinds(model.blocks(), model, model.config.layers)


@pytest.mark.parametrize(
    ("config", "lora", "dtype", "fp8"),
    [
        (LLAMA, LORA, torch.float32, False),
        (LLAMA, LORA, torch.bfloat16, True),
        (LLAMA, None, torch.float32, False),
        (LLAMA, None, torch.bfloat16, False),
        (LLAMA, FIRST_TRAINED, torch.float32, False),
        (LLAMA, WITH_EMBEDDING, torch.bfloat16, False),
        (GEMMA, LORA, torch.float32, False),
        (GEMMA, None, torch.float32, False),
    ],
)
def test_a_trace_of_few_blocks_is_that_of_all(
    config: DecoderConfig, lora: LoRAConfig | None, dtype: torch.dtype, fp8: bool
) -> None:
    few, whole = (
        StepTracer(adapted(config, lora, fp8=fp8), compute_dtype=dtype, whole=is_whole)
        for is_whole in (False, True)
    )
    assert len(few.model.trunk.blocks()) < len(whole.model.trunk.blocks())
    for size, learned, learns in ((2, 0.5, True), (19, 1.0, True), (3, 1.0, lora is None)):
        one, other = (
            tracer.trace(size, 64, packed=size > 1, learned_fraction=learned, learns=learns)
            for tracer in (few, whole)
        )
        if config is LLAMA:
            assert one == other
        total = other.activations + other.loss + other.gradients
        for part, value in vars(one).items():
            assert abs(value - vars(other)[part]) <= TOLERANCE * total


def test_gradients_that_are_sharded_do_not_stay() -> None:
    few, whole, held = (
        StepTracer(
            adapted(LLAMA, None), compute_dtype=torch.float32, holds_gradients=holds, whole=is_whole
        ).trace(1, 16, packed=False)
        for holds, is_whole in ((False, False), (False, True), (True, False))
    )
    assert few == whole
    assert few.gradients == 0
    assert few.activations + few.loss < held.activations + held.loss + held.gradients


def test_blocks_that_differ_are_of_other_kinds() -> None:
    assert representatives(kinds(adapted(LLAMA, LORA))) == [0, 1, 1, 1, 1, 1, 6]
    # LOCAL and GLOBAL; the first and the last stand for themselves.
    expected = [0, 1, 1, 3, 1, 1, 1, 7]
    assert representatives(kinds(adapted(GEMMA, LORA))) == expected
    # Frozen blocks before, the first that trains, a frozen one behind it, and so on.
    assert representatives(kinds(adapted(LLAMA, FIRST_TRAINED))) == [0, 1, 2, 3, 4, 3, 6]
    ranks = LoRAConfig(rank=4, rank_pattern={"layers.3.self_attn.q_proj": 8})
    assert representatives(kinds(adapted(LLAMA, ranks))) == [0, 1, 1, 3, 1, 1, 6]
    assert representatives(["a"]) == [0]


def test_plans_of_every_mode_are_those_of_whole_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = PlanInputs(LLAMA, LORA, 4, 64, "cuda", torch.bfloat16)
    totals = []
    for whole in (False, True):

        class Tracer(StepTracer):
            def __init__(self, model: Decoder, **settings: Any) -> None:
                super().__init__(model, **settings, whole=whole)  # noqa: B023

        monkeypatch.setattr(traces_module, "StepTracer", Tracer)
        monkeypatch.setattr(traces_module, "_TRACED", {})
        planner = MemoryPlanner(inputs)
        for mode in ("none", "cheap", "full", "full+offload", "auto"):
            planned = planner.plan(memory=MemoryConfig(mode, 0.02))  # type: ignore[arg-type]
            assert planned.step == "fast"
            totals.append(planned.total)
    assert totals[:5] == totals[5:]
    assert len(set(totals)) >= 4


def test_what_is_known_of_a_model_is_not_traced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces_module, "_TRACED", {})
    inputs = PlanInputs(TINY, LORA, 4, 64, "cpu", torch.float32)
    first = MemoryPlanner(inputs, base_bytes=0).plan()
    monkeypatch.setattr(StepTracer, "trace", None)
    assert MemoryPlanner(inputs, base_bytes=0).plan() == first
    more = MemoryPlanner(replace(inputs, micro_batches=2), base_bytes=0).plan()
    assert more.activations == first.activations
    for other in (
        replace(inputs, tokens=65),
        replace(inputs, micro_batch_size=5),
        replace(inputs, packed=False),
        replace(inputs, learned_fraction=0.5),
        replace(inputs, lora=replace(LORA, dropout=0.1)),
        replace(inputs, config=replace(TINY, tie_word_embeddings=False)),
    ):
        with pytest.raises(TypeError):
            MemoryPlanner(other, base_bytes=0).plan()


@pytest.mark.parametrize(
    ("device", "dtype", "config", "rooms"),
    [
        ("cpu", torch.float32, LLAMA, (2e7, 1e11)),
        ("cuda", torch.bfloat16, LLAMA, (2e7, 3e8, 1e11)),  # the fast step
        ("cuda", torch.bfloat16, GEMMA, (3e8,)),  # the captured one
    ],
)
def test_the_largest_batch_takes_few_traces(
    device: str,
    dtype: torch.dtype,
    config: DecoderConfig,
    rooms: tuple[float, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n_traces = 0

    def count(self: StepTracer, *sizes: int, **settings: object) -> object:
        nonlocal n_traces
        n_traces += 1
        return whole_trace(self, *sizes, **settings)  # type: ignore[arg-type]

    whole_trace = StepTracer.trace
    monkeypatch.setattr(StepTracer, "trace", count)
    inputs = PlanInputs(config, LORA, 1, 64, device, dtype)
    for room in rooms:
        n_traces = 0
        monkeypatch.setattr(traces_module, "_TRACED", {})
        planner = MemoryPlanner(inputs, base_bytes=0)
        size = planner.largest_micro_batch(int(room))
        per_size = 2 if planner.plan().step == "captured" else 1
        assert n_traces <= 7 * per_size
        assert size == 0 or planner.plan(size).total <= room
        assert planner.plan(size + 1).total > room
