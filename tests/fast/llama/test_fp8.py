"""The hand-written step over an fp8 base against the plain step over the same codes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lora.config import BaseWeights
from lora.data.sequences.batches import Batch
from lora.decoder.decoder import Decoder
from lora.decoder.quantised.fp8 import Fp8Linear, Fp8Weight
from lora.fast.llama import buffers
from lora.fast.llama.checkpointing import MODES
from lora.fast.llama.fp8 import Fp8ScratchRows
from lora.fast.memory.fast_step import fast_memory
from lora.fast.step import FastStep
from lora.kernels.step.fp8 import FP8
from lora.kernels.step.ops import PLAIN
from lora.layers.quantised_model import use_quantised_linears
from lora.training.optim import build_optimizer
from tests.fast.conftest import GEMMA, GRANITE, RATES, apply_random_lora, check_steps, relative

EXACT = replace(PLAIN, fp8_dtype=torch.float64)
"""Operations whose fp8 rows are not rounded: everything else is compared exactly."""
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tied": ({}, {"rank_pattern": {"k_proj": 2}}),
    "untied, biases": ({"tied": False, "bias": True}, {}),
    "two targets": ({"window": 4}, {"targets": ("q_proj", "down_proj")}),
    "one block": ({}, {"layers": (1,)}),
    "Gemma": (GEMMA, {"layers": (1, 2)}),
    "Granite": (GRANITE, {"layers": (1, 2)}),
}


def quantised(model: Decoder, **settings: Any) -> Decoder:
    """Return `model` with fp8 linears and LoRA beside them, all of it random."""
    weights = {n: m.weight.detach() for n, m in model.named_modules() if hasattr(m, "in_features")}
    use_quantised_linears(model, BaseWeights("fp8"))
    for name, module in model.named_modules():
        if isinstance(module, Fp8Linear):
            module.load(weights[name], name)
    return apply_random_lora(model, next(model.parameters()).dtype, **settings)


@pytest.mark.parametrize("mode", [*MODES, "none, swiglu recomputed"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_steps_equal_the_plain_ones_where_nothing_is_rounded(
    tiny_decoder: Callable[..., Decoder],
    make_batch: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    packed: bool,
    mode: str,
) -> None:
    sizes, settings = CASES[name]
    recomputes = mode.endswith("recomputed")
    monkeypatch.setattr(buffers, "MAX_STORED_SWIGLU_BYTES", 0 if recomputes else 1e9)
    monkeypatch.setattr(buffers, "FEED_FORWARD_CHUNK_TOKENS", 20)
    checkpointing = MODES.get(mode)
    plain = quantised(tiny_decoder(**sizes), **settings)
    step = FastStep(
        copy.deepcopy(plain),
        EXACT,
        torch.float64,
        checkpointing=checkpointing,
        own_attention=recomputes,
    )
    batches = [
        [make_batch(10 * number + index, packed=packed) for index in range(2)]
        for number in range(len(RATES))
    ]
    check_steps(step, plain, build_optimizer(plain, 1.0, 0.0), batches)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_rounded_rows_change_gradients_by_a_few_hundredths(
    tiny_decoder: Callable[..., Decoder], make_batch: Callable[..., Batch], dropout: float
) -> None:
    model = tiny_decoder(dtype=torch.float32)
    with torch.no_grad():  # attention that is not all or nothing
        for name, parameter in model.named_parameters():
            parameter.mul_(0.3 if name.endswith("proj.weight") else 1.0)
    plain = quantised(model, dropout=dropout)
    exact = FastStep(
        copy.deepcopy(plain), replace(PLAIN, fp8_dtype=torch.float32), torch.float32, seed=5
    )
    rounded = FastStep(copy.deepcopy(plain), PLAIN, torch.float32, seed=5)
    batch = make_batch(0, packed=True)
    for step in (exact, rounded):
        step.launch([batch], 0.0)
    assert rounded.report[0].item() == pytest.approx(exact.report[0].item(), rel=0.02)
    errors = [
        relative(own.gradients, other.gradients)
        for own, other in zip(rounded.flat.slots, exact.flat.slots, strict=True)
    ]
    assert 0.005 < max(errors) < 0.2
    whole = relative(rounded.flat.gradients, exact.flat.gradients)
    assert 0.005 < whole < 0.1


def test_a_fourth_digit_before_rounding_moves_gradients_half_as_far_as_rounding(
    tiny_decoder: Callable[..., Decoder], make_batch: Callable[..., Batch]
) -> None:
    """Why two fp8 steps are compared with an unrounded one, not with each other."""
    draw = torch.Generator().manual_seed(7)

    def shaken(*arguments: Any) -> None:
        PLAIN.scaled_matmul(*arguments)
        out = arguments[-1]
        out.mul_(1 + 1e-4 * torch.randn(out.shape, generator=draw))

    model = tiny_decoder(dtype=torch.float32)
    with torch.no_grad():  # attention that is not all or nothing
        for name, parameter in model.named_parameters():
            parameter.mul_(0.3 if name.endswith("proj.weight") else 1.0)
    model = quantised(model)
    exact, rounded, other = (
        FastStep(copy.deepcopy(model), ops, torch.float32)
        for ops in (
            replace(PLAIN, fp8_dtype=torch.float32),
            PLAIN,
            replace(PLAIN, scaled_matmul=shaken),
        )
    )
    for step in (exact, rounded, other):
        step.launch([make_batch(0, packed=True)], 0.0)
    of_rounding = relative(rounded.flat.gradients, exact.flat.gradients)
    assert relative(other.flat.gradients, rounded.flat.gradients) > 0.4 * of_rounding
    assert relative(other.flat.gradients, exact.flat.gradients) < 1.3 * of_rounding


@pytest.mark.parametrize("changes", [{}, GEMMA, GRANITE])
def test_norms_and_swiglu_write_the_fp8_rows_that_matmuls_read(
    tiny_decoder: Callable[..., Decoder],
    make_batch: Callable[..., Batch],
    changes: dict[str, Any],
) -> None:
    """Only attention's output and its gradient are quantised in passes of their own."""
    made = []

    def counting(x: torch.Tensor, into: Any) -> None:
        made.append(x.shape[1])
        PLAIN.quantise_rows(x, into)

    model = quantised(tiny_decoder(dtype=torch.float32, **changes))
    step = FastStep(model, replace(PLAIN, quantise_rows=counting), torch.float32)
    step.launch([make_batch(0, packed=True)], 0.0)
    n_blocks, inner, qkv = 3, 48, 48 + 2 * 16
    assert sorted(made) == [inner] * n_blocks + [qkv] * (n_blocks - 1)


def test_fp8_rows_are_read_once() -> None:
    scratch = Fp8ScratchRows(torch.zeros(64, dtype=FP8), torch.zeros(4, 1))
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    scratch.reserve(x).write(x)
    left = scratch.quantised(x, PLAIN)
    codes, scales = left.codes.float(), left.scales.clone()
    x.mul_(2)
    second = scratch.quantised(x, PLAIN)
    assert torch.equal(second.codes.float(), codes)  # twice the values, twice the scale
    assert torch.equal(second.scales, 2 * scales)


def test_fp8_rows_may_be_read_in_chunks() -> None:
    scratch = Fp8ScratchRows(torch.zeros(80, dtype=FP8), torch.zeros(5, 1))
    x = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))[:, :16]
    whole = scratch.reserve(x)
    whole.write(x)
    codes, scales = whole.codes.float(), whole.scales.clone()
    x.mul_(2)
    for part in (slice(0, 2), slice(2, 4), slice(4, 5)):
        rows = scratch.quantised(x[part], PLAIN)
        assert torch.equal(rows.codes.float(), codes[part])
        assert torch.equal(rows.scales, scales[part])
    assert torch.equal(scratch.quantised(x[2:4], PLAIN).scales, 2 * scales[2:4])


def test_memory_counts_fp8_codes(tiny_decoder: Callable[..., Decoder]) -> None:
    model = quantised(tiny_decoder(dtype=torch.float32))
    codes = sum(m.weight.numel() for m in model.modules() if isinstance(m, Fp8Weight))
    held = fast_memory(copy.deepcopy(model), 2, 16)
    step = FastStep(model, PLAIN, torch.bfloat16)
    real = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for owner in (*step.network.projections, *step.network.weights)
        for value in vars(owner).values()
        for t in (value if isinstance(value, list) else [value])
        if isinstance(t, torch.Tensor)
    }
    real.pop(step.flat.values.untyped_storage().data_ptr(), None)
    assert held.weights == sum(real.values()) + step.flat.values.numel() * 4
    twice = sum(p.numel() for w in step.network.projections for p in w.weights)
    assert twice == codes
