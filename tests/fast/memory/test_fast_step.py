"""The planned memory of a hand-written step against a real one, and against peaks of a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora.adapters.apply import apply_lora
from lora.config import BaseWeights, LoRAConfig
from lora.decoder.decoder import Decoder, build_empty_decoder
from lora.fast.llama.buffers import Buffers
from lora.fast.llama.checkpointing import MODES
from lora.fast.memory.fast_step import FastPlan, fast_memory, fit_memory
from lora.fast.step import FastStep
from lora.kernels.step.ops import PLAIN
from lora.pretrained.load.models import quantise_empty_model
from tests.fast.conftest import CAPPED
from tests.tiny_llama import llama_config

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
ROOM_GB = 142.1
"""What `auto` may plan for on an H200 with nothing else on it."""
BASES = {
    "": BaseWeights(),
    "fp8": BaseWeights("fp8"),
    "int8": BaseWeights("int8"),
    "nf4": BaseWeights("nf4"),
    "nf4_embeddings": BaseWeights("nf4", nf4_embeddings=True),
}
SHAPES = {  # hidden, layers, heads, shared, feed-forward, vocabulary, rows, tokens
    "135M-4x512": (576, 30, 9, 3, 1536, 49152, 4, 512),
    "1B-1x512": (2048, 16, 32, 8, 8192, 128256, 1, 512),
    "1B-4x2048": (2048, 16, 32, 8, 8192, 128256, 4, 2048),
    "8B-1x2048": (4096, 32, 32, 8, 14336, 128256, 1, 2048),
    "70B-1x2048": (8192, 80, 64, 8, 28672, 128256, 1, 2048),
    "8B-4x2048": (4096, 32, 32, 8, 14336, 128256, 4, 2048),
    "8B-1x32768": (4096, 32, 32, 8, 14336, 128256, 1, 32768),
    "8B-1x131072": (4096, 32, 32, 8, 14336, 128256, 1, 131072),
}


def build(case: str, *, full: bool, base: str = "") -> Decoder:
    hidden, layers, heads, shared, wide, vocabulary, _, _ = SHAPES[case]
    config = llama_config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        heads=(heads, shared, hidden // heads),
        feed_forward=wide,
        n_layers=layers,
        max_position_embeddings=4096,
        tied=hidden < 4096,
    )
    model = build_empty_decoder(config)
    if full:
        return model.requires_grad_(True)
    model.bfloat16()
    quantise_empty_model(model, BASES[base])
    return apply_lora(model, LoRAConfig(rank=16, alpha=32.0))  # type: ignore[return-value]


def measured() -> list[tuple[str, str, float]]:
    lines = [
        json.loads(line)
        for name in ("gpu_step_h200.jsonl", "gpu_step_h200_before.jsonl")
        for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()
    ]
    ours = [r for r in lines if r["variant"] in ("ours_lora", "ours_lora_packed", "ours_full")]
    return [(r["case"], r["variant"], r["peak_gb"]) for r in ours]


@pytest.mark.parametrize(("case", "variant", "peak_gb"), measured())
def test_predictions_are_near_the_peaks_measured_on_an_h200(
    case: str, variant: str, peak_gb: float
) -> None:
    model = build(case, full=variant == "ours_full")
    rows, tokens = SHAPES[case][-2:]
    predicted = fast_memory(model, rows, tokens, packed=variant.endswith("packed"))
    assert predicted.total / 1e9 == pytest.approx(peak_gb, rel=0.15)


def modes_measured() -> list[tuple[str, str, float]]:
    lines = [
        json.loads(line)
        for name in ("gpu_step_8b_h200.jsonl", "gpu_long_h200.jsonl")
        for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()
    ]
    ours = [r for r in lines if r["variant"].startswith("ours_lora")]
    return [(r["case"], r["variant"], r["peak_gb"]) for r in ours]


@pytest.mark.parametrize(("case", "variant", "peak_gb"), modes_measured())
def test_plans_of_modes_are_near_the_peaks_measured_on_an_h200(
    case: str, variant: str, peak_gb: float
) -> None:
    model = build(case, full=False, base="fp8" if "fp8" in variant else "")
    is_packed = variant.endswith("packed")
    plan = FastPlan(model, *SHAPES[case][-2:], packed=is_packed)
    kind = variant.removeprefix("ours_lora").removeprefix("_fp8").removeprefix("_")
    mode = {"": "none", "packed": "none", "offload": "full+offload"}.get(kind, kind)
    room = {"cheap": 32.0, "auto": ROOM_GB}.get(mode)
    fit = fit_memory(plan, mode, None if room is None else int(room * 1e9))
    assert fit.memory.total / 1e9 == pytest.approx(peak_gb, rel=0.02)


def test_an_fp8_base_is_near_the_peak_measured_on_an_h100() -> None:
    path = RESULTS / "gpu_step_fp8_h100.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    (peak_gb,) = (r["peak_gb"] for r in lines if r["variant"] == "ours_lora_fp8_one_copy")
    planned = {}
    for base in ("fp8", ""):
        model = build("8B-4x2048", full=False, base=base)
        planned[base] = fast_memory(model, 4, 2048, packed=False).total / 1e9
    assert planned["fp8"] == pytest.approx(peak_gb, rel=0.06)
    assert planned[""] > 1.1 * planned["fp8"]


def quantised_measured() -> list[tuple[str, str, str, float]]:
    lines = [
        json.loads(line)
        for name in ("gpu_nf4_h200.jsonl", "gpu_nf4_first_h200.jsonl")
        for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()
    ]
    found = []
    for row in lines:
        kind = row["variant"].removeprefix("ours_lora").removeprefix("_")
        base = max((name for name in BASES if kind.startswith(name)), key=len)
        mode = kind.removeprefix(base).removeprefix("_") or "none"
        if row["variant"].startswith("ours_lora"):
            found.append((row["case"], base, mode, row["peak_gb"]))
    assert len(found) >= 12
    return found


@pytest.mark.parametrize(("case", "base", "mode", "peak_gb"), quantised_measured())
def test_plans_over_quantised_bases_are_near_the_peaks_measured_on_an_h200(
    case: str, base: str, mode: str, peak_gb: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As it was measured: phases that follow one another had scratch of their own.
    monkeypatch.setattr(Buffers, "_phase_scratch", lambda *_: None)
    model = build(case, full=False, base=base)
    plan = FastPlan(model, *SHAPES[case][-2:], packed=False)
    assert plan.memory(MODES[mode]).total / 1e9 == pytest.approx(peak_gb, rel=0.01)


def test_normed_heads_add_one_scratch_for_all_blocks(tiny_decoder: Callable[..., Decoder]) -> None:
    normed, plain = (
        fast_memory(apply_lora(tiny_decoder(qk_norm=kind), LoRAConfig(rank=4)), 2, 16)  # type: ignore[arg-type]
        for kind in ("head", None)
    )
    assert normed.activations - plain.activations == 2 * 16 * (6 + 2) * 8 * 2  # N · (H + S) · D
    assert normed.weights - plain.weights == 3 * 2 * 8 * 2


def test_capped_attention_takes_what_packed_sequences_do(
    tiny_decoder: Callable[..., Decoder],
) -> None:
    """Our own kernels serve both, and torch's keep nothing."""
    packed, unpacked = (
        fast_memory(apply_lora(tiny_decoder(**CAPPED), LoRAConfig(rank=4)), 2, 16, packed=is_packed)  # type: ignore[arg-type]
        for is_packed in (True, False)
    )
    assert packed == unpacked


@pytest.mark.parametrize("full", [False, True])
def test_parts_are_those_of_a_real_step(tiny_decoder: Callable[..., Decoder], full: bool) -> None:
    def make() -> Decoder:
        model = tiny_decoder(dtype=torch.float32)
        if full:
            return model.requires_grad_(True)
        return apply_lora(model, LoRAConfig(rank=4))  # type: ignore[return-value]

    step = FastStep(make(), PLAIN, torch.bfloat16)
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for p in step.model.parameters()
    }
    flat = step.flat.values.untyped_storage()
    held = sum(storages.values()) - (0 if flat.data_ptr() in storages else flat.nbytes())
    predicted = fast_memory(make(), 2, 16)
    assert predicted.gradients == flat.nbytes()
    assert predicted.optimizer == 2 * flat.nbytes()
    # The copies in the compute dtype come on top of what the parameters are views of.
    assert predicted.weights >= held
    assert predicted.weights - held <= sum(p.numel() * 2 for p in step.model.parameters()) * 2
