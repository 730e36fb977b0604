"""Linears that read the same input: one operation where possible, else called one by one."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from lora.kernels.shared_input import call_linears
from lora.layers.fused import FusedLoRALinear
from lora.lora_module import LoRALinear


def build(kind: type[LoRALinear]) -> list[LoRALinear]:
    torch.manual_seed(0)
    layers = [kind(nn.Linear(6, n_out), 2) for n_out in (4, 3)]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    return layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_as_one_by_one(dtype: torch.dtype) -> None:
    layers = [layer.to(dtype) for layer in build(FusedLoRALinear)]
    x = torch.randn(5, 6, dtype=dtype)
    seen = call_linears(x, *layers)
    assert "_LoRALinears" in type(seen[0].grad_fn).__name__
    for y, layer in zip(seen, layers, strict=True):
        torch.testing.assert_close(y, layer(x))


def test_linears_of_different_classes_are_called_one_by_one() -> None:
    (fused, _), (plain, _) = build(FusedLoRALinear), build(LoRALinear)
    x, linear = torch.randn(5, 6), nn.Linear(6, 2)
    for group in ((fused, plain), (plain, fused), (fused, linear), (linear,)):
        seen = call_linears(x, *cast(tuple[nn.Module, ...], group))
        assert all(torch.equal(y, layer(x)) for y, layer in zip(seen, group, strict=True))


def test_a_hook_sees_its_linear() -> None:
    layers, calls = build(FusedLoRALinear), []
    hook = layers[1].register_forward_hook(lambda _, inputs, output: calls.append(output))
    x: Tensor = torch.randn(5, 6)
    seen = call_linears(x, *layers)
    assert len(calls) == 1
    assert calls[0] is seen[1]
    hook.remove()
    call_linears(x, *layers)
    assert len(calls) == 1


def test_autocast_to_bf16_works_on_a_cpu() -> None:
    layers, x = build(FusedLoRALinear), torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = call_linears(x, *layers)
    for y, layer in zip(outputs, layers, strict=True):
        assert y.dtype is torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    sum(y.float().sum() for y in outputs).backward()
    assert all(layer.lora_A.grad is not None for layer in layers)
