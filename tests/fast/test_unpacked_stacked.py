"""The stacked hand-written step over an nf4 base: against the plain one, and unpacked values."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora.config import BaseWeights, LoRAConfig
from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder
from lora.device import choose_device
from lora.fast.llama import buffers
from lora.fast.memory.fast_step import stacked_memory
from lora.fast.stacked_step import StackedFastStep
from lora.fast.weights.stacked_projection import StackedProjection
from lora.fast.weights.unpacked import UnpackedProjection, UnpackedStackedProjection
from lora.fast.why_not import why_not_stacked_hand_written
from lora.kernels.step.ops import PLAIN
from lora.stacked.apply import StackedAdapters, remove_stacked
from lora.stacked.losses import StackedDecoderLoss, stack_batches
from lora.stacked.plain_step import PlainStackedRunner
from tests.fast.conftest import GEMMA, PHI, apply_random_stacked, relative
from tests.fast.test_stacked_step import RATES, STEPS, TRAIN, build, configs
from tests.fast.test_unpacked import packed, unpacked

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], BaseWeights]] = {
    "nf4": ({}, {"rank_pattern": {"k_proj": 1}, "alpha_pattern": {"up_proj": 2.0}},
            BaseWeights("nf4")),
    "single, biases": ({"tied": False, "bias": True}, {"layers": (1,)},
                       BaseWeights("nf4", nf4_block=32, nf4_double_quant=False)),
    "two targets": ({}, {"targets": ("q_proj", "down_proj")}, BaseWeights("nf4")),
    "tables": ({}, {}, BaseWeights("nf4", nf4_embeddings=True)),
    "int8, Gemma": (GEMMA, {}, BaseWeights("int8")),
    "fused": (PHI, {}, BaseWeights("nf4")),
}  # fmt: skip


def stack(model: Decoder, **settings: Any) -> StackedAdapters:
    """Changes `model` in place: random adapters in fp64, as the step has them in these tests."""
    stacked = apply_random_stacked(model, configs(**settings))
    for layer in stacked.layers.values():
        layer.double()
    return stacked


def batches_of(make_batch: Callable[..., Batch], number: int, *, packed: bool) -> list[Batch]:
    return [
        stack_batches([make_batch(seed + 10 * number + k, packed=packed) for k in range(3)])
        for seed in (0, 100)
    ]


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_the_plain_steps(
    tiny_decoder: Callable[..., Decoder],
    make_batch: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    sizes, settings, base = CASES[name]
    monkeypatch.setattr(buffers, "FEED_FORWARD_CHUNK_TOKENS", 20)
    keep = ("v_proj",) if name == "nf4" else ()  # a folder in 4 bits may leave single ones
    plain = packed(tiny_decoder(**sizes), base=base, keep=keep)
    fast = copy.deepcopy(plain)
    reference, own = stack(plain, **settings), stack(fast, **settings)
    frozen = {n: t.clone() for n, t in fast.state_dict().items() if "lora" not in n}
    assert why_not_stacked_hand_written(fast, own) is None
    loss_fn = StackedDecoderLoss(reference)
    training = PlainStackedRunner(plain, reference, loss_fn, TRAIN, choose_device("cpu", "fp32"))
    step = build(fast, own, TRAIN)
    assert not step.merges  # a narrow model, but a packed base
    assert f"{base.base_dtype} weights unpacked for each of them" in step.describe()
    for number in range(STEPS):
        batches = batches_of(make_batch, number, packed=True)
        training.launch(number + 1, batches, RATES)
        (outcome,) = training.finished(wait=True)
        step.launch(batches, RATES, number + 1)
        assert step.report[:, 0].tolist() == pytest.approx(outcome.losses, rel=1e-6)
        assert step.report[:, 3].tolist() == [1.0, 1.0, 1.0]
    for k in range(3):
        for key, expected in reference.values(k).items():
            assert relative(own.values(k)[key], expected) < 1e-5, (k, key)
    after = fast.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in frozen.items())
    remove_stacked(fast, own)
    assert {m for m in map(type, fast.modules()) if "Stacked" in m.__name__} == set()


@pytest.mark.parametrize("name", ["nf4", "single, biases"])
def test_steps_equal_those_over_the_unpacked_values_to_the_bit(
    tiny_decoder: Callable[..., Decoder], make_batch: Callable[..., Batch], name: str
) -> None:
    sizes, settings, base = CASES[name]
    model = packed(tiny_decoder(dtype=torch.float32, **sizes), base=base)
    found = []
    for one in (unpacked(model), model):
        stacked = apply_random_stacked(one, configs(**settings))
        step = StackedFastStep(
            one,
            stacked,
            PLAIN,
            torch.float32,
            weight_decays=[0.1] * 3,
            max_grad_norms=[0.05] * 3,
            merges=False,
        )
        for number in range(STEPS):
            step.launch(batches_of(make_batch, number, packed=True), RATES, number + 1)
        found.append((step.flat.values.clone(), step.report.clone()))
    for plain, quantised in zip(*found, strict=True):
        assert torch.equal(plain, quantised)


def test_an_adapter_that_is_not_finite_is_stopped_and_the_others_keep_their_bits(
    tiny_decoder: Callable[..., Decoder], make_batch: Callable[..., Batch]
) -> None:
    def train(break_at: int) -> StackedFastStep:
        model = packed(tiny_decoder())
        stacked = stack(model)
        step = build(model, stacked, TRAIN)
        for number in range(3):
            if number == break_at:
                with torch.no_grad():
                    next(iter(stacked.layers.values())).lora_A[1, 0, 0] = math.nan
                step.refresh()
            step.launch(batches_of(make_batch, number, packed=False), RATES, number + 1)
        return step

    whole, broken = train(-1), train(1)
    assert broken.update.taken_steps.tolist() == [3.0, 1.0, 3.0]
    for k in (0, 2):
        assert torch.equal(whole.flat.values[k], broken.flat.values[k])
        assert torch.equal(whole.flat.square[k], broken.flat.square[k])


def test_every_projection_is_unpacked_into_one_scratch(
    tiny_decoder: Callable[..., Decoder], make_batch: Callable[..., Batch]
) -> None:
    model = packed(tiny_decoder())
    stacked = stack(model, targets=("q_proj", "down_proj"))
    step = build(model, stacked, TRAIN)
    step.launch(batches_of(make_batch, 0, packed=True), RATES)
    qkv, output, gate_up, down = step.network.projections
    assert isinstance(qkv, UnpackedStackedProjection)
    assert isinstance(down, UnpackedStackedProjection)
    assert isinstance(output, UnpackedProjection)
    assert not isinstance(output, StackedProjection)
    assert isinstance(gate_up, UnpackedProjection)
    addresses = {p.weights[0].data_ptr() for p in (qkv, output, gate_up)}
    assert len(addresses) == 1
    assert down.weights[0].data_ptr() not in addresses


def test_the_plan_counts_codes_and_scales(tiny_decoder: Callable[..., Decoder]) -> None:
    config = tiny_decoder().config
    loras = [LoRAConfig(rank=2, init_seed=k) for k in range(3)]
    kept = [
        stacked_memory(config, loras, 2, 16, packed=False, base=base).weights
        for base in (None, BaseWeights("nf4"))
    ]
    linears = sum(
        2 * p.numel() for n, p in tiny_decoder().named_parameters() if "layers" in n and p.ndim == 2
    )
    # K merged weights as well go away: this model is narrow.
    assert kept[0] - kept[1] == pytest.approx((1 - 0.26 + 3) * linears, rel=0.1)
