"""An fp8 base on a GPU: the fast step against its plain operations, and a whole run."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora.adapters.apply import apply_lora, lora_layers
from lora.config import BaseWeights, LoRAConfig
from lora.decoder.config import FeedForwardConfig
from lora.decoder.decoder import Decoder, build_decoder
from lora.decoder.quantised.fp8 import Fp8Linear, has_fp8_base
from lora.device import choose_device
from lora.fast.llama import buffers
from lora.fast.llama.checkpointing import MODES
from lora.fast.step import FastStep
from lora.fast.why_not import why_not_fast, why_not_fp8
from lora.kernels.step.jit import HAS_TRITON
from lora.kernels.step.ops import PLAIN, TRITON
from lora.layers.quantised_model import use_quantised_linears
from lora.runs.disk import read_json
from tests.heard import Heard
from tests.integration.gpu_runs import folder_of, learn_alike
from tests.integration.test_gpu_nf4 import VOCABULARY, batch
from tests.tiny_llama import changed, llama_config

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (HOPPER and HAS_TRITON), reason="needs a GPU of capability 9.0 and Triton"
    ),
]
PLAIN_ROWS = replace(
    TRITON,
    add_norm=PLAIN.add_norm,
    norm_backward=PLAIN.norm_backward,
    swiglu=PLAIN.swiglu,
    swiglu_backward=PLAIN.swiglu_backward,
    quantise_rows=PLAIN.quantise_rows,
    scaled_matmul=PLAIN.scaled_matmul,
    transpose_codes=PLAIN.transpose_codes,
)
"""The fast step's operations, with the plain twins of everything in fp8."""
EXACT = replace(PLAIN, fp8_dtype=torch.float32)
"""Activations that are not rounded."""


GEMMA: dict[str, Any] = {
    "block": "sandwich",
    "qk_norm": "head",
    "embedding_scale": 16.0,
    "feed_forward": FeedForwardConfig(528, "gelu_pytorch_tanh"),
}


def build(**changes: Any) -> Decoder:
    config = llama_config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        heads=(8, 2, 32),
        feed_forward=528,
        n_layers=4,
        max_position_embeddings=512,
        bias=True,
    )
    config = changed(config, **changes)
    model = build_decoder(config, 0, dtype=torch.bfloat16, device="cuda")
    draw = torch.Generator("cuda").manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.05 if parameter.ndim > 1 else 0.2
            noise = torch.randn(parameter.shape, generator=draw, device="cuda")
            parameter.add_(spread * noise)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    use_quantised_linears(model, BaseWeights("fp8"))
    for name, module in model.named_modules():
        if isinstance(module, Fp8Linear):
            module.load(weights[f"{name}.weight"], name)
    apply_lora(model, LoRAConfig(rank=8, init_seed=0))
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.copy_(
                0.05 * torch.randn(layer.lora_B.shape, generator=draw, device="cuda")
            )
    return model


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("mode", "changes"),
    [("none", {}), ("cheap", {}), ("full", {}), ("none", GEMMA), ("full", GEMMA)],
)
def test_the_device_is_as_near_to_rows_not_rounded_as_plain_operations(
    mode: str, changes: dict[str, Any], packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Device and plain twin cannot be near each other: what differs by 1e-4 before a value is
    rounded puts codes on either side of an edge, which moves gradients by as much as rounding does.
    """
    monkeypatch.setattr(buffers, "FEED_FORWARD_CHUNK_TOKENS", 256)
    model = build(**changes)
    fast = FastStep(copy.deepcopy(model), TRITON, torch.bfloat16, checkpointing=MODES[mode])
    plain = FastStep(copy.deepcopy(model), PLAIN_ROWS, torch.bfloat16, checkpointing=MODES[mode])
    exact = FastStep(copy.deepcopy(model), EXACT, torch.float32)
    batches = batch(packed=packed)
    for step in (fast, plain, exact):
        step.launch([batches], 0.0)
    assert fast.graphs.why_not is None
    assert fast.report[0].item() == pytest.approx(plain.report[0].item(), rel=2e-3)
    assert fast.report[0].item() == pytest.approx(exact.report[0].item(), rel=0.02)
    errors = [
        [
            relative(slot.gradients, other.gradients)
            for slot, other in zip(step.flat.slots, exact.flat.slots, strict=True)
        ]
        for step in (fast, plain)
    ]
    own, twins = (relative(step.flat.gradients, exact.flat.gradients) for step in (fast, plain))
    print(f"gradients' errors, {mode}: device {own:.4f} {max(errors[0]):.4f}, twins {twins:.4f}")
    assert own < 1.15 * twins + 0.01 < 0.2
    for found, twin in zip(*errors, strict=True):
        assert found < 1.3 * twin + 0.02


def test_steps_learn_and_leave_the_codes_alone() -> None:
    model = build()
    before = {n: b.clone() for n, b in model.state_dict().items() if "lora_" not in n}
    assert why_not_fast(model, choose_device("cuda")) is None
    step = FastStep(model, TRITON, torch.bfloat16)
    losses = []
    for number in range(1, 31):
        step.launch([batch(packed=True)], 3e-3, number)
        losses.append(step.report[0].item())
    assert losses[-1] < losses[0] - 0.5
    for name, value in model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value.view(torch.uint8), before[name].view(torch.uint8)), name


def test_a_whole_run_says_what_it_does_and_learns(tiny_folder: Path, tmp_path: Path) -> None:
    heard = Heard()
    for job in learn_alike("fp8", tiny_folder, tmp_path, heard):
        assert read_json(folder_of(job) / "run.json")["base_dtype"] == "fp8"
    assert any("frozen matmuls in fp8" in line for line in heard.said)


def test_older_gpus_are_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    model = build()
    assert has_fp8_base(model)
    assert "capability 9.0; this one has 8.6" in str(why_not_fp8(choose_device("cuda")))
    assert "capability 9.0" in str(why_not_fast(model, choose_device("cuda")))
