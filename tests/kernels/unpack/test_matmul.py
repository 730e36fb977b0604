"""x Wᵀ over nf4, as torch runs it and inside torch.compile: equal, and W is never kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.utils.flop_counter import FlopCounterMode

from lora.kernels.nf4 import Nf4Tensor, quantise_nf4, unpack_nf4
from lora.kernels.unpack import matmul
from lora.kernels.unpack.matmul import nf4_linear

OUTPUTS, INPUTS = 48, 32


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[True, False], ids=["double", "single"])
def packed(request: pytest.FixtureRequest) -> Nf4Tensor:
    return quantise_nf4(drawn(OUTPUTS, INPUTS, seed=0), double_quant=request.param)


def plain(packed: Nf4Tensor) -> Tensor:
    out = torch.empty(OUTPUTS, INPUTS)
    unpack_nf4(packed, out)
    return out


def test_values_and_gradients_are_those_of_the_unpacked_weight(packed: Nf4Tensor) -> None:
    x = drawn(2, 5, INPUTS, seed=1).requires_grad_()
    y, wanted = nf4_linear(x, packed), F.linear(x, plain(packed))
    assert torch.equal(y, wanted)
    dy = drawn(2, 5, OUTPUTS, seed=2)
    (found,), (dx,) = (torch.autograd.grad(each, x, dy) for each in (y, wanted))
    assert torch.equal(found, dx)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # the compiler's own
def test_a_compiled_block_has_one_operation_each_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate, up = (quantise_nf4(drawn(OUTPUTS, INPUTS, seed=n)) for n in (0, 1))
    down = quantise_nf4(drawn(INPUTS, OUTPUTS, seed=3))
    called: list[str] = []
    for name in ("_forward", "_backward"):
        own = vars(matmul)[name]

        def counted(*inputs: Any, name: str = name, own: Any = own, **named: Any) -> Tensor:
            called.append(name)
            return own(*inputs, **named)

        monkeypatch.setattr(matmul, name, counted)

    def block(x: Tensor) -> Tensor:
        normed = F.rms_norm(x, (INPUTS,))
        return x + nf4_linear(F.silu(nf4_linear(normed, gate)) * nf4_linear(normed, up), down)

    x = drawn(2, 5, INPUTS, seed=1).requires_grad_()
    (wanted,) = torch.autograd.grad(block(x).square().sum(), x)
    torch._dynamo.reset()
    # Its graphs are those of inductor, and need no compiler.
    compiled = torch.compile(
        block, backend="aot_eager_decomp_partition", dynamic=False, fullgraph=True
    )
    called.clear()
    with functorch_config.patch(activation_memory_budget=0.99, is_non_builtin_to_include=True):
        (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    assert called == 3 * ["_forward"] + 3 * ["_backward"]


def test_the_compiler_knows_what_it_costs(packed: Nf4Tensor) -> None:
    x, tensors = drawn(7, INPUTS, seed=1), (packed.codes, packed.scales)
    groups = packed.group_scales, packed.offset, packed.block
    with FlopCounterMode(display=False) as counter:
        torch.ops.lora_lm.nf4_linear(x, *tensors, *groups)
        torch.ops.lora_lm.nf4_linear_backward(x.new_zeros(7, OUTPUTS), *tensors, *groups)
    assert counter.get_total_flops() == 2 * (2 * 7 * OUTPUTS * INPUTS)
