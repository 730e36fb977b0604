"""Memory modes of the fast step on a GPU: what they learn, and what they hold."""

from __future__ import annotations

import pytest
import torch

from lora.adapters.apply import apply_lora
from lora.config import LoRAConfig
from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder, build_decoder
from lora.fast import hand_written
from lora.fast.llama import buffers, checkpointing
from lora.fast.llama.checkpointing import MODES, ActivationCheckpointing
from lora.fast.memory.fast_step import FastPlan
from lora.fast.step import FastStep
from lora.kernels.step.jit import HAS_TRITON
from lora.kernels.step.ops import TRITON
from tests.tiny_llama import llama_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and HAS_TRITON), reason="needs a CUDA device and Triton"
    ),
]
VOCABULARY, N_LAYERS = 1000, 8
TOLERANCE = 0.01
"""Relative, a tensor: products in parts round otherwise than products at once."""
POLICIES = {
    **{name: policy for name, policy in MODES.items() if name != "none"},
    "mixed": ActivationCheckpointing(stores_norms=False, n_stored_gate_up=2, n_stored_qkv=5),
    "full but attention of six": ActivationCheckpointing(
        stores_norms=False, n_stored_gate_up=0, n_stored_qkv=2, n_stored_attention=6
    ),
}


def build(width: int) -> Decoder:
    config = llama_config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        heads=(width // 64, width // 128, 64),
        feed_forward=2 * width,
        n_layers=N_LAYERS,
        max_position_embeddings=4096,
        tied=False,
    )
    model = build_decoder(config, 0, dtype=torch.bfloat16, device="cuda")
    apply_lora(model, LoRAConfig(rank=8, init_seed=0))
    draw = torch.Generator("cuda").manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.05, generator=draw)
    return model


def make_batch(rows: int, tokens: int, *, packed: bool) -> Batch:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (rows, tokens), generator=draw)
    documents, positions = torch.zeros_like(ids), torch.arange(tokens).expand(rows, -1).clone()
    if packed:
        for start in (50, 51, 130):
            documents[0, start:] += 1
            positions[0, start:] = torch.arange(tokens - start)
    return Batch(ids, ids.roll(-1, 1), positions, documents)


def gradients(
    batches: list[Batch], width: int, policy: ActivationCheckpointing | None
) -> tuple[FastStep, torch.Tensor]:
    """Return the step and its gradients after three launches that change nothing."""
    fast = FastStep(build(width), TRITON, torch.bfloat16, checkpointing=policy)
    for number in (1, 2, 3):
        fast.launch(batches, 0.0, number)
    assert fast.graphs.why_not is None
    return fast, fast.flat.gradients.clone()


@pytest.mark.parametrize("width", [512, 1024])  # merged, and in the products
@pytest.mark.parametrize("packed", [True, False])
def test_all_modes_are_mode_none(packed: bool, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "FEED_FORWARD_CHUNK_TOKENS", 160)
    monkeypatch.setattr(checkpointing, "HOST_CHUNK_BYTES", 10**5)
    batches = [make_batch(2, 192, packed=packed), make_batch(2, 192, packed=False)]
    plain, expected = gradients(batches, width, None)
    for name, policy in POLICIES.items():
        fast, found = gradients(batches, width, policy)
        assert fast.report[0].item() == pytest.approx(plain.report[0].item(), rel=1e-3), name
        for slot, other in zip(fast.flat.slots, plain.flat.slots, strict=True):
            apart = (slot.gradients - other.gradients).norm()
            assert apart <= TOLERANCE * other.gradients.norm(), name
        assert (found - expected).norm() <= TOLERANCE * expected.norm(), name


@pytest.mark.parametrize("captures", [True, False])
def test_residuals_are_back_in_time(captures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies to the host and back run beside the products: the same kernels, the same bits.

    Rows are packed, so that attention is ours: the backward of torch's adds in any order.
    """
    if not captures:
        monkeypatch.setattr(hand_written, "CAPTURE_BELOW_TOKENS", 0)
    batches = [make_batch(4, 2048, packed=True)]
    _, expected = gradients(batches, 1024, MODES["full"])
    _, again = gradients(batches, 1024, MODES["full"])
    assert torch.equal(again, expected)  # or the next lines would show nothing
    for _ in range(3):
        _, found = gradients(batches, 1024, MODES["full+offload"])
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", MODES)
def test_a_mode_holds_what_is_planned(name: str) -> None:
    rows, tokens = 4, 2048
    plan = FastPlan(build(1024), rows, tokens, packed=False).memory(MODES[name])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fast, _ = gradients([make_batch(rows, tokens, packed=False)], 1024, MODES[name])
    held = torch.cuda.max_memory_allocated() - before - fast.flat.gradients.nbytes  # the clone
    assert plan.total == pytest.approx(held, rel=0.15)
