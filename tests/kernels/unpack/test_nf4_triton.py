"""The Triton kernel that unpacks nf4 against its plain twin: on a GPU, or interpreted.

Without a GPU: TRITON_INTERPRET=1 pytest tests/kernels/unpack/test_nf4_triton.py (triton installed).
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from lora.kernels.nf4 import Nf4Tensor, quantise_nf4, unpack_nf4, unpack_nf4_rows
from lora.kernels.step.jit import HAS_TRITON
from lora.kernels.unpack.nf4 import unpack_nf4_rows_triton, unpack_nf4_triton

IS_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (HAS_TRITON and (IS_GPU or os.environ.get("TRITON_INTERPRET") == "1")),
        reason="needs Triton with a CUDA device or its interpreter",
    ),
]
DEVICE = "cuda" if IS_GPU else "cpu"
# The interpreter's own cast to bf16 cuts off; fp32 is not rounded.
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if IS_GPU else (torch.float32,)
SHAPES = [(40, 4096, 64), (37, 96, 64), (12, 576, 128), (5, 4864, 256), (5, 6, 32), (9, 1024, 4096)]
"""Rows, columns, and values of a block: whole blocks in a row, parts of them, several rows."""


def packed_weight(rows: int, columns: int, block: int, *, double_quant: bool) -> Nf4Tensor:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=draw) * torch.logspace(-3, 0, rows)[:, None]
    weight[0] = 0
    weight = weight.to(torch.bfloat16).to(DEVICE)
    return quantise_nf4(weight, block, double_quant=double_quant)


def on_cpu(packed: Nf4Tensor) -> Nf4Tensor:
    tensors = packed.codes, packed.scales, packed.group_scales, packed.offset
    return Nf4Tensor(*(tensor.cpu() for tensor in tensors), packed.block)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("rows", "columns", "block"), SHAPES)
def test_values_have_the_bits_of_the_plain_twins(
    rows: int, columns: int, block: int, double_quant: bool
) -> None:
    packed = packed_weight(rows, columns, block, double_quant=double_quant)
    for dtype in DTYPES:
        for first in (0, rows // 2):
            # Gaps between the rows, as where LoRA's matrices lie beside W.
            plain: Tensor = torch.full((rows - first, columns + 16), 7.0, dtype=dtype)
            fast = plain.to(DEVICE)
            unpack_nf4(on_cpu(packed), plain[:, :columns], first)
            unpack_nf4_triton(packed, fast[:, :columns], first)
            assert torch.equal(fast.cpu(), plain)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("rows", "columns", "block"), SHAPES)
def test_single_rows_have_them_too(rows: int, columns: int, block: int, double_quant: bool) -> None:
    packed = packed_weight(rows, columns, block, double_quant=double_quant)
    ids = torch.tensor([rows - 1, 0, 3, 3, 1], device=DEVICE)
    for dtype in DTYPES:
        plain = torch.empty(len(ids), columns, dtype=dtype)
        fast = plain.to(DEVICE)
        unpack_nf4_rows(on_cpu(packed), ids.cpu(), plain)
        unpack_nf4_rows_triton(packed, ids, fast)
        assert torch.equal(fast.cpu(), plain)
