"""Plans of today's families' steps: against what a real step holds, and peaks of a GPU."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lora.adapters.apply import apply_lora
from lora.config import LoRAConfig
from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder
from lora.fast.llama.checkpointing import MODES
from lora.fast.memory.fast_step import CUBLAS_WORKSPACE_BYTES, FastPlan, stacked_memory
from lora.fast.step import FastStep
from lora.kernels.step.ops import PLAIN
from tests.fast.conftest import CAPPED, GEMMA, GRANITE, OLMO, PHI

ROOT = Path(__file__).parents[3]
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen 3": {"qk_norm": "head"},
    "Gemma": GEMMA,
    "Granite": GRANITE,
    "OLMo": OLMO,
    "Phi": PHI,
    "capped": CAPPED,
}


def tensors_in(value: object, seen: set[int]) -> Iterator[torch.Tensor]:
    """Yield the tensors that an object of ours holds, through its attributes and containers."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors_in(one, seen)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one, seen)
    elif type(value).__module__.startswith("lora.fast"):
        yield from tensors_in(vars(value), seen)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_plan_counts_all_that_a_step_holds(
    tiny_decoder: Callable[..., Decoder], make_batch: Callable[..., Batch], name: str, full: bool
) -> None:
    def make() -> Decoder:
        model = tiny_decoder(**FAMILIES[name], dtype=torch.float32 if full else torch.bfloat16)
        if full:
            return model.requires_grad_(True)
        return apply_lora(model, LoRAConfig(rank=4))  # type: ignore[return-value]

    batch = make_batch(0, packed=True)
    plan = FastPlan(make(), *batch.input_ids.shape)
    for mode in ("none", "cheap", "full"):
        step = FastStep(make(), PLAIN, torch.bfloat16, checkpointing=MODES[mode])
        step.launch([batch], 1e-3)
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in tensors_in(vars(step), set())
        }
        held, planned = sum(storages.values()), plan.memory(MODES[mode])
        assert planned.total - CUBLAS_WORKSPACE_BYTES == pytest.approx(held, rel=0.05), mode


def measured() -> list[dict[str, Any]]:
    rows = [
        json.loads(line)
        for path in (ROOT / "benchmarks" / "results").glob("gpu_families_*.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return [
        r for r in rows if r["variant"] in ("ours", "ours_packed", "sweep_4") and "peak_gb" in r
    ]


@pytest.mark.parametrize("row", measured(), ids=lambda row: f"{row['shape']}:{row['variant']}")
def test_plans_are_near_the_peaks_of_a_gpu(
    row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    shape = importlib.import_module("families.cases").SHAPES[row["shape"]]
    empty = importlib.import_module("one_gpu.models").build_empty(shape).bfloat16()
    loras = [LoRAConfig(rank=16, alpha=32.0, init_seed=k) for k in range(4)]
    sizes = shape.rows, shape.tokens
    if row["variant"] == "sweep_4":
        planned = stacked_memory(empty.config, loras, *sizes, packed=False)
    else:
        model: Any = apply_lora(empty, loras[0])
        plan = FastPlan(model, *sizes, packed=row["variant"].endswith("packed"))
        planned = plan.memory(MODES["none"])
    assert planned.total / 1e9 == pytest.approx(row["peak_gb"], rel=0.05)
