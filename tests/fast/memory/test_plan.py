"""Memory plans against counts by hand, real steps, and measured runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora.adapters.apply import apply_lora
from lora.config import LoRAConfig, MemoryConfig
from lora.decoder.config import AttentionConfig, FeedForwardConfig, LayerConfig, RopeConfig
from lora.decoder.decoder import build_decoder
from lora.errors import ConfigError
from lora.fast.memory.plan import PlanInputs
from lora.fast.memory.planner import largest_micro_batch, plan_memory
from lora.lora_module import count_lora_parameters
from tests.fast.memory.conftest import TINY

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
LORA = LoRAConfig(rank=4)
SETTING = PlanInputs(TINY, LORA, 2, 64, "cpu", torch.float32)


def plan(setting: PlanInputs):  # type: ignore[no-untyped-def]
    return plan_memory(setting, base_bytes=0)


def test_parameters_are_the_models() -> None:
    model = build_decoder(TINY)
    full = sum(p.numel() for p in model.parameters())
    counts = count_lora_parameters(apply_lora(model, LORA))
    planned = plan(SETTING)
    assert (planned.trained_parameters, planned.parameters) == (counts.lora, counts.total)
    assert planned.weights == 4 * counts.total
    assert planned.optimizer == 8 * counts.lora
    assert planned.gradients == 4 * counts.lora
    whole = plan(replace(SETTING, lora=None))
    assert whole.trained_parameters == whole.parameters == full
    assert (whole.weights, whole.optimizer) == (4 * full, 8 * full)


def test_fully_trained_modules_count_as_trained() -> None:
    lora = LoRAConfig(rank=4, modules_to_save=("embed_tokens",))
    planned = plan(replace(SETTING, lora=lora))
    assert planned.trained_parameters == plan(SETTING).trained_parameters + 300 * 32


def test_activations_are_what_a_real_forward_saves() -> None:
    """Every storage that autograd saves in a real forward pass, parameters left out."""
    model = apply_lora(build_decoder(TINY), LORA)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(2, 64, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model.hidden_states(ids)
    planned = plan(replace(SETTING, packed=False)).activations
    assert hidden.requires_grad
    assert 0.95 * sum(saved.values()) <= planned <= 1.3 * sum(saved.values())


@pytest.mark.parametrize("lora", [LORA, None])
@pytest.mark.parametrize(("device", "fast"), [("cpu", True), ("cuda", True), ("cuda", False)])
def test_more_sequences_tokens_and_rank_take_more(
    device: str, fast: bool, lora: LoRAConfig | None
) -> None:
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    setting = replace(SETTING, device_type=device, compute_dtype=kind, fast=fast, lora=lora)
    total = plan(setting).total
    assert plan(replace(setting, micro_batch_size=4)).total > total
    assert plan(replace(setting, tokens=128)).total > total
    if lora is not None:
        assert plan(replace(setting, lora=LoRAConfig(rank=16))).total > total


def test_which_step_is_planned() -> None:
    on_gpu = replace(SETTING, device_type="cuda", compute_dtype=torch.bfloat16)
    normed = replace(TINY, attention=AttentionConfig(4, 2, 8, qk_norm="head"))
    assert plan(SETTING).step == "plain"
    assert plan(on_gpu).step == "fast"
    other = replace(TINY, feed_forward=replace(TINY.feed_forward, activation="relu"))
    assert plan(replace(on_gpu, config=normed)).step == "fast"
    assert plan(replace(on_gpu, config=other)).step == "captured"
    assert plan(replace(on_gpu, fast=False)).step == "plain"


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_embedding_rows_take_the_backward_pass_through_all_blocks(kind: str) -> None:
    deep = replace(TINY, layers=TINY.layers * 3)
    top = replace(LORA, layers=(len(deep.layers) - 1,))
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    setting = replace(SETTING, config=deep, lora=top, device_type=kind, compute_dtype=dtype)
    without, planned = (plan(replace(setting, embedding_rows=n)) for n in (0, 2))
    assert planned.activations > without.activations
    assert planned.trained_parameters == without.trained_parameters + 2 * 32
    assert planned.step == without.step == ("fast" if kind == "cuda" else "plain")


def on_gpu(**memory: object) -> PlanInputs:
    config = replace(TINY, layers=TINY.layers * 3)
    return replace(
        SETTING,
        config=config,
        micro_batch_size=64,
        device_type="cuda",
        compute_dtype=torch.bfloat16,
        memory=MemoryConfig(**memory),  # type: ignore[arg-type]
    )


def test_modes_of_memory_hold_less_and_less() -> None:
    totals = [plan(on_gpu(memory=m)).total for m in ("none", "cheap", "full", "full+offload")]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == 4


def test_the_fastest_mode_that_fits_is_found() -> None:
    none, cheap, full = (plan(on_gpu(memory=m)) for m in ("none", "cheap", "full"))
    cheapest = plan(on_gpu(memory="cheap", memory_gb=1e-6))
    assert plan(on_gpu()).checkpointing == none.checkpointing  # no room is known
    for room, mode in (
        (2 * none.total, "none"),
        (none.total, "none"),
        (none.total - 1, "cheap"),
        (cheap.total - 1, "cheap"),
        (cheapest.total, "cheap"),
        (cheapest.total - 1, "full"),
        ((cheapest.total + full.total) // 2, "full"),
        (full.total, "full"),
        (full.total - 1, "full+offload"),
    ):
        planned = plan(on_gpu(memory_gb=room / 1e9))
        assert planned.total <= room
        assert planned.reason.startswith(f"activation checkpointing {mode}: "), planned.reason
    tight = plan(on_gpu(memory_gb=1e-6))
    assert tight.reason.startswith("activation checkpointing full+offload: ")
    assert "may not fit" in tight.reason


def test_cheap_recomputes_as_much_as_the_budget_demands() -> None:
    most, least = plan(on_gpu(memory="cheap")), plan(on_gpu(memory="cheap", memory_gb=1e-6))
    assert most.checkpointing is not None
    assert least.checkpointing is not None
    assert (most.checkpointing.n_stored_gate_up, least.checkpointing.n_stored_gate_up) == (6, 0)
    between = plan(on_gpu(memory="cheap", memory_gb=(most.total + least.total) / 2e9))
    assert between.checkpointing is not None
    assert between.checkpointing.n_stored_gate_up in (2, 3)
    assert least.total < between.total < most.total
    resumed = replace(on_gpu(memory_gb=1.0), checkpointing=between.checkpointing)
    again = plan(resumed)
    assert again.total == between.total


def test_the_largest_micro_batch_fits_and_one_more_sequence_does_not() -> None:
    available = plan(replace(SETTING, micro_batch_size=7)).total
    rows = largest_micro_batch(SETTING, available, base_bytes=0)
    assert plan(replace(SETTING, micro_batch_size=rows)).total <= available
    assert rows == 7
    assert largest_micro_batch(SETTING, 1000, base_bytes=0) == 0


def test_the_process_counts() -> None:
    assert plan_memory(SETTING).total > 50e6  # Python and torch
    assert plan_memory(SETTING, base_bytes=10**9).total == plan(SETTING).total + 10**9


@pytest.mark.parametrize(("rows", "tokens"), [(0, 64), (2, 1)])
def test_sizes_that_make_no_sense_are_refused(rows: int, tokens: int) -> None:
    with pytest.raises(ConfigError, match=f"{rows} sequences of {tokens} tokens. Allowed"):
        plan_memory(replace(SETTING, micro_batch_size=rows, tokens=tokens))


def test_eight_billion_are_planned_without_memory() -> None:
    layer = LayerConfig(RopeConfig(5e5), None, 128**-0.5)
    large = replace(
        TINY,
        vocab_size=128256,
        hidden_size=4096,
        tie_word_embeddings=False,
        attention=AttentionConfig(32, 8, 128),
        feed_forward=FeedForwardConfig(14336, "silu"),
        layers=(layer,) * 32,
    )
    setting = PlanInputs(large, LoRAConfig(rank=16), 1, 2048, "cuda", torch.bfloat16)
    planned = plan(setting)
    assert planned.parameters > 8e9
    assert 16e9 < planned.total < 40e9


@pytest.mark.parametrize(
    ("file", "planned", "most"),
    [
        ("plan_memory_cpu.jsonl", "error_fraction", 0.20),
        ("plan_memory_h200.jsonl", "error_fraction_now", 0.15),
    ],
)
def test_measured_grids_are_within_what_is_promised(file: str, planned: str, most: float) -> None:
    rows = [json.loads(line) for line in (RESULTS / file).read_text().splitlines()]
    assert len(rows) >= 8
    assert all(abs(row[planned]) <= most for row in rows)
