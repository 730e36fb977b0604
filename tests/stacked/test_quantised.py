"""K adapters on one quantised linear: each computes what it would alone, over the same codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lora.decoder.quantised.base import QuantisedWeight
from lora.decoder.quantised.fp8 import Fp8Linear
from lora.decoder.quantised.int8 import Int8Linear
from lora.decoder.quantised.nf4 import Nf4Linear
from lora.layers.quantised import LORA_LINEARS, LoRAQuantisedLinear
from lora.stacked.layers import Stack, StackedLoRALinear
from lora.stacked.quantised import STACKED_LINEARS, StackedQuantisedLinear, build_stacked_linear
from tests.stacked.three_adapters import (
    DROPOUTS,
    NO_DROPOUT,
    RANKS,
    SCALINGS,
    SEEDS,
    check_others_keep_their_bits,
    draw,
)

INPUTS, OUTPUTS = 10, 14
BASES = ("fp8", "nf4", "nf4 single", "int8")


def quantised(base: str, dtype: torch.dtype) -> QuantisedWeight:
    linear = nn.Linear(INPUTS, OUTPUTS, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(draw(OUTPUTS, INPUTS, seed=1))
        linear.bias.copy_(draw(OUTPUTS, seed=2))
    by_row = {"fp8": Fp8Linear, "int8": Int8Linear}
    made: QuantisedWeight = (
        by_row[base](linear)
        if base in by_row
        else Nf4Linear(linear, 32, double_quant=base == "nf4")
    )
    made.load(linear.weight.detach(), "a linear")
    return made


def alone(base: str, k: int, dtype: torch.dtype, dropout: float) -> LoRAQuantisedLinear:
    weight = quantised(base, dtype)
    layer = LORA_LINEARS[weight.kind](weight, RANKS[k], dropout=dropout, scaling=SCALINGS[k])
    with torch.no_grad():
        layer.lora_A.copy_(draw(RANKS[k], INPUTS, seed=10 + k))
        layer.lora_B.copy_(draw(OUTPUTS, RANKS[k], seed=20 + k))
    return layer


def together(
    base: nn.Module, dtype: torch.dtype, dropouts: tuple[float, ...] = NO_DROPOUT
) -> StackedLoRALinear:
    layer = build_stacked_linear(base, Stack(SEEDS), RANKS, SCALINGS, dropouts)
    for k in range(3):
        single = alone("nf4", k, dtype, 0.0)
        layer.fill(k, single.lora_A.detach(), single.lora_B.detach())
    return layer


def close(left: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    # Of quantised layers A and B are fp32, whatever the inputs are.
    return bool((left - right).norm() <= 1e-5 * right.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dropouts", [NO_DROPOUT, DROPOUTS])
@pytest.mark.parametrize("base", BASES)
def test_each_adapter_is_as_it_would_be_alone(
    base: str, dropouts: tuple[float, ...], dtype: torch.dtype
) -> None:
    layer = together(quantised(base, dtype), dtype, dropouts)
    assert isinstance(layer, StackedQuantisedLinear)
    x = draw(6, 4, INPUTS, seed=3).to(dtype).requires_grad_()
    target = draw(6, 4, OUTPUTS, seed=4).to(dtype)
    y = layer(x)
    (y * target).sum().backward()
    for k, part in enumerate(x.detach().chunk(3)):
        single, own = alone(base, k, dtype, dropouts[k]), part.clone().requires_grad_()
        torch.manual_seed(SEEDS[k])
        expected = single(own)
        (expected * target.chunk(3)[k]).sum().backward()
        rank = RANKS[k]
        pairs: list[tuple[Tensor | None, Tensor | None]] = [
            (y.detach().chunk(3)[k], expected.detach()),
            (x.grad.chunk(3)[k], own.grad),  # type: ignore[union-attr]
            (layer.lora_A.grad[k, :rank], single.lora_A.grad),  # type: ignore[index]
            (layer.lora_B.grad[k, :, :rank], single.lora_B.grad),  # type: ignore[index]
        ]
        for seen, wanted in pairs:
            assert seen is not None
            assert wanted is not None
            assert close(seen, wanted, dtype)


def test_it_computes_what_a_plain_linear_with_the_unpacked_values_does() -> None:
    base = quantised("nf4", torch.float32)
    plain = nn.Linear(INPUTS, OUTPUTS)
    plain.weight = nn.Parameter(base.unpacked(torch.float32))
    plain.bias = base.bias  # type: ignore[assignment]
    x = draw(6, 4, INPUTS, seed=3).float()
    outs, grads = [], []
    for one in (base, plain):
        layer = together(one, torch.float32)
        outs.append(layer(x))
        (outs[-1] ** 2).sum().backward()
        grads.append((layer.lora_A.grad, layer.lora_B.grad))
    assert close(outs[0].detach(), outs[1].detach(), torch.float32)
    for seen, wanted in zip(*grads, strict=True):
        assert close(seen, wanted, torch.float32)  # type: ignore[arg-type]


@pytest.mark.parametrize("base", BASES)
def test_a_nan_in_one_adapter_leaves_the_bits_of_the_others(base: str) -> None:
    check_others_keep_their_bits(lambda: together(quantised(base, torch.float32), torch.float32))


def test_the_base_is_shared_and_comes_back() -> None:
    base = quantised("nf4", torch.float32)
    before = {name: t.clone() for name, t in base.state_dict().items()}
    layer = together(base, torch.float32)
    assert layer.weight is base.weight
    assert not layer.weight.requires_grad
    plain = layer.unwrap()
    assert isinstance(plain, Nf4Linear)
    assert plain.weight is base.weight
    assert plain.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in plain.state_dict().items())


def test_every_kind_can_be_stacked() -> None:
    assert STACKED_LINEARS.keys() == LORA_LINEARS.keys()
