"""Traces of transformers' models, and of native decoders of the same architectures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lora.adapters.apply import apply_lora
from lora.config import LoRAConfig
from lora.decoder.families import decoder_config
from lora.decoder.language_model import LanguageModel
from lora.fast.memory import traces as traces_module
from lora.fast.memory.plan import PlanInputs
from lora.fast.memory.planner import MemoryPlanner
from lora.fast.memory.trace import StepMemory, StepTracer
from lora.pretrained.load.models import empty_language_model
from lora.pretrained.transformers_models.load import as_language_model, empty_of_config
from tests.pretrained.tiny_models import ARCHITECTURES, tiny_transformers

transformers = pytest.importorskip("transformers")
LORA = LoRAConfig(rank=2)
SIZE, TOKENS = 3, 48
NAMES_OF_DEPTH = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
REAL = {
    "gemma3_text": "masks by kind of block, norms on both sides",
    "phi3": "fused linears",
    "cohere2": "blocks in parallel, scaled logits",
    "gpt2": "Conv1D",
    "bloom": "eager attention",
    "mixtral": "experts",
    "mamba": "no attention",
}
NATIVE = ("gemma2", "phi3", "granite", "olmo2", "gemma3_text", "qwen3")


def deeper(name: str, times: int) -> dict[str, Any]:
    """Return the settings that repeat the two blocks of a tiny model."""
    own = ARCHITECTURES[name]
    more: dict[str, Any] = {key: 2 * times for key in NAMES_OF_DEPTH if key in own}
    if "layer_types" in own:
        more["layer_types"] = own["layer_types"] * times
    return more


def saved_bytes(model: LanguageModel, *, packed: bool) -> int:
    """Return what autograd saves in a real forward pass, parameters left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.ones(SIZE, TOKENS, dtype=torch.int64)
    documents = torch.arange(TOKENS).repeat(SIZE, 1) // 16 if packed else None
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model.hidden_states(ids, document_ids=documents)
    assert hidden.requires_grad
    return sum(saved.values())


def traced(model: LanguageModel, *, packed: bool, whole: bool = False) -> StepMemory:
    tracer = StepTracer(model, compute_dtype=torch.float32, whole=whole)
    return tracer.trace(SIZE, TOKENS, packed=packed)


@pytest.mark.parametrize("name", REAL)
def test_activations_are_what_a_real_forward_saves(name: str) -> None:
    theirs = tiny_transformers(name)
    model = as_language_model(theirs)
    empty = empty_of_config(model.config)  # type: ignore[arg-type]
    apply_lora(model, LORA)
    packed = model.why_not_packed is None
    real = saved_bytes(model.train(), packed=packed)
    found = traced(apply_lora(empty, LORA), packed=packed)  # type: ignore[arg-type]
    # The peak has what a block's backward pass allocates too, which counts in two tiny blocks.
    assert 0.95 * real <= found.activations <= 1.7 * real


@pytest.mark.parametrize("name", NATIVE)
def test_native_decoders_hold_what_they_save(name: str) -> None:
    source = tiny_transformers(name).config.to_dict()
    config = decoder_config(source)
    empty = empty_language_model(config)
    real = empty_language_model(config).to_empty(device="cpu")
    for parameter in real.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    apply_lora(real, LORA)
    saved = saved_bytes(real, packed=True)
    found = traced(apply_lora(empty, LORA), packed=True)  # type: ignore[arg-type]
    assert 0.95 * saved <= found.activations <= 1.7 * saved


@pytest.mark.parametrize("name", ["gemma3_text", "gpt2", "mixtral"])
def test_a_trace_of_few_blocks_is_that_of_all(name: str) -> None:
    config = as_language_model(tiny_transformers(name, **deeper(name, 3))).config
    models = [apply_lora(empty_of_config(config), LORA) for _ in range(2)]  # type: ignore[arg-type]
    few, whole = models
    one, other = traced(few, packed=True), traced(whole, packed=True, whole=True)  # type: ignore[arg-type]
    assert len(few.blocks()) < len(whole.blocks()) == 6  # type: ignore[operator]
    assert one == other


def test_a_plan_has_all_parts_and_a_batch_that_fits() -> None:
    config = as_language_model(tiny_transformers("cohere2", **deeper("cohere2", 2))).config
    inputs = PlanInputs(config, LORA, 2, TOKENS, "cpu", torch.float32)
    planner = MemoryPlanner(inputs, base_bytes=0)
    plan = planner.plan()
    assert plan.step == "plain"
    assert plan.parameters > plan.trained_parameters > 0
    assert min(plan.weights, plan.optimizer, plan.activations, plan.gradients) > 0
    largest = planner.largest_micro_batch(3 * plan.total)
    assert planner.plan(largest).total <= 3 * plan.total < planner.plan(largest + 1).total
    on_gpu = MemoryPlanner(replace(inputs, device_type="cuda", compute_dtype=torch.bfloat16)).plan()
    assert on_gpu.step == "captured"
    full = MemoryPlanner(replace(inputs, lora=None), base_bytes=0).plan()
    assert full.optimizer == 8 * full.parameters


def test_recurrent_blocks_are_traced_on_few_tokens() -> None:
    config = as_language_model(tiny_transformers("mamba")).config
    inputs = PlanInputs(config, LORA, 1, 40, "cpu", torch.float32, packed=False)
    planned = MemoryPlanner(inputs, base_bytes=0).plan()
    whole = StepTracer(
        apply_lora(empty_of_config(config), LORA),  # type: ignore[arg-type]
        compute_dtype=torch.float32,
    ).trace(1, 40, packed=False)
    assert planned.activations == pytest.approx(whole.activations, rel=0.02)


def test_a_model_whose_code_needs_values_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(traces_module, "_TRACED", {})
    monkeypatch.setattr(StepTracer, "trace", refuses)
    config = as_language_model(tiny_transformers("opt")).config
    small, large = (
        MemoryPlanner(PlanInputs(config, LORA, size, TOKENS, "cpu", torch.float32)).plan()
        for size in (1, 4)
    )
    assert 0 < 3 * small.activations < large.activations
