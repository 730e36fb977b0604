"""K adapters on one linear: each computes what it would alone, and none affects another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lora.errors import ConfigError, ModelError
from lora.lora_module import LoRALinear
from lora.stacked.layers import (
    FusedStackedLoRALinear,
    Stack,
    StackedEmbedding,
    StackedLoRALinear,
)
from lora.stacked.quantised import build_stacked_linear
from tests.stacked.three_adapters import (
    DROPOUTS,
    NO_DROPOUT,
    RANKS,
    SCALINGS,
    SEEDS,
    check_others_keep_their_bits,
    draw,
)

INPUTS, OUTPUTS = 7, 6


def base_linear(dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(INPUTS, OUTPUTS, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(draw(OUTPUTS, INPUTS, seed=1))
        linear.bias.copy_(draw(OUTPUTS, seed=2))
    return linear


def alone(k: int, dtype: torch.dtype, dropout: float) -> LoRALinear:
    layer = LoRALinear(base_linear(dtype), RANKS[k], dropout=dropout, scaling=SCALINGS[k])
    with torch.no_grad():
        layer.lora_A.copy_(draw(RANKS[k], INPUTS, seed=10 + k))
        layer.lora_B.copy_(draw(OUTPUTS, RANKS[k], seed=20 + k))
    return layer


def together(dtype: torch.dtype, dropouts: tuple[float, ...] = NO_DROPOUT) -> StackedLoRALinear:
    stack = Stack(SEEDS)
    layer = build_stacked_linear(base_linear(dtype), stack, RANKS, SCALINGS, dropouts)
    for k in range(3):
        single = alone(k, dtype, dropouts[k])
        layer.fill(k, single.lora_A.detach(), single.lora_B.detach())
    return layer


def close(left: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    return bool((left - right).norm() <= tolerance * right.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dropouts", [NO_DROPOUT, DROPOUTS])
@pytest.mark.parametrize("shape", [(6, 4, INPUTS), (3, 2, 4, INPUTS), (3, 1, INPUTS)])
def test_each_adapter_is_as_it_would_be_alone(
    dtype: torch.dtype, dropouts: tuple[float, ...], shape: tuple[int, ...]
) -> None:
    layer = together(dtype, dropouts)
    assert isinstance(layer, FusedStackedLoRALinear) is not any(dropouts)
    x = draw(*shape, seed=3).to(dtype).requires_grad_()
    target = draw(*shape[:-1], OUTPUTS, seed=4).to(dtype)
    y = layer(x)
    (y * target).sum().backward()
    assert y.shape == target.shape
    for k, part in enumerate(x.detach().chunk(3)):
        single, own = alone(k, dtype, dropouts[k]), part.clone().requires_grad_()
        torch.manual_seed(SEEDS[k])
        expected = single(own)
        (expected * target.chunk(3)[k]).sum().backward()
        assert close(y.detach().chunk(3)[k], expected.detach(), dtype)
        assert x.grad is not None
        assert own.grad is not None
        assert close(x.grad.chunk(3)[k], own.grad, dtype)
        rank, (da, db) = RANKS[k], (layer.lora_A.grad, layer.lora_B.grad)
        assert da is not None
        assert db is not None
        assert close(da[k, :rank], single.lora_A.grad, dtype)  # type: ignore[arg-type]
        assert close(db[k, :, :rank], single.lora_B.grad, dtype)  # type: ignore[arg-type]
        assert not da[k, rank:].any()
        assert not db[k, :, rank:].any()


def test_the_fused_layer_agrees_with_the_plain_one() -> None:
    fused = together(torch.float32)
    plain = StackedLoRALinear(base_linear(torch.float32), Stack(SEEDS), RANKS, SCALINGS, NO_DROPOUT)
    plain.load_state_dict(fused.state_dict())
    x = draw(6, 4, INPUTS, seed=3).float()
    outs = [layer(x) for layer in (fused, plain)]
    for out in outs:
        (out**2).sum().backward()
    assert close(outs[0].detach(), outs[1].detach(), torch.float32)
    for name in ("lora_A", "lora_B"):
        left, right = (getattr(layer, name).grad for layer in (fused, plain))
        assert close(left, right, torch.float32)


@pytest.mark.parametrize("dropouts", [NO_DROPOUT, DROPOUTS])
def test_a_nan_in_one_adapter_leaves_the_bits_of_the_others(dropouts: tuple[float, ...]) -> None:
    check_others_keep_their_bits(lambda: together(torch.float32, dropouts))


def test_each_adapter_trains_its_own_embedding() -> None:
    base, stack = nn.Embedding(5, 3), Stack(SEEDS)
    tables = StackedEmbedding(base, stack)
    with torch.no_grad():
        tables.weight.copy_(draw(3, 5, 3, seed=5))
    ids = torch.tensor([[0, 1], [4, 1], [2, 2]])
    out = tables(ids)
    assert torch.equal(out, torch.stack([tables.weight[k][ids[k]] for k in range(3)]))
    out[1].sum().backward()
    assert tables.weight.grad is not None
    assert tables.weight.grad[1].any()
    assert not tables.weight.grad[[0, 2]].any()
    assert tables.unwrap() is base
    stack.batch_size = 2
    places = tables(torch.arange(4))
    assert places.shape == (6, 4, 3)
    assert torch.equal(places[3], tables.weight[1, :4])


def test_errors_name_the_fault() -> None:
    with pytest.raises(ConfigError, match="Cannot stack 3 adapters with 2 ranks"):
        StackedLoRALinear(base_linear(torch.float32), Stack(SEEDS), (1, 2), SCALINGS, NO_DROPOUT)
    with pytest.raises(ConfigError, match="rank=0"):
        StackedLoRALinear(base_linear(torch.float32), Stack(SEEDS), (1, 2, 0), SCALINGS, NO_DROPOUT)
    with pytest.raises(ModelError, match="a batch of 4 among 3 stacked adapters"):
        together(torch.float32)(torch.zeros(4, 2, INPUTS))
    with pytest.raises(ModelError, match="batch_size is not set"):
        StackedEmbedding(nn.Embedding(5, 3), Stack(SEEDS))(torch.arange(4))


def test_outputs_may_be_changed_in_place() -> None:
    layer, x = together(torch.float64), draw(9, 4, INPUTS, seed=4)
    wanted = torch.autograd.grad(layer(x).clamp(min=0).sum(), [layer.lora_A, layer.lora_B])
    grads = torch.autograd.grad(layer(x).clamp_(min=0).sum(), [layer.lora_A, layer.lora_B])
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))
