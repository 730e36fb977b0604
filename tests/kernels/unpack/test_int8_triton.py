"""The Triton kernel that unpacks int8 rows against its plain twin: on a GPU, or interpreted.

Without a GPU: TRITON_INTERPRET=1 pytest tests/kernels/unpack (triton installed).
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from lora.kernels.int8 import quantise_int8, unpack_int8
from lora.kernels.step.jit import HAS_TRITON
from lora.kernels.unpack.int8 import unpack_int8_triton

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


@pytest.mark.parametrize(("rows", "columns"), [(7, 4096), (37, 96), (3, 5000), (5, 7)])
def test_values_have_the_bits_of_the_plain_twins(rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    packed = quantise_int8(weight.bfloat16())
    for dtype in DTYPES:
        # Gaps between the rows, as where LoRA's matrices lie beside W.
        plain: Tensor = torch.full((rows, columns + 16), 7.0, dtype=dtype)
        fast = plain.to(DEVICE)
        unpack_int8(packed.codes, packed.scales, plain[:, :columns])
        codes, scales = packed.codes.to(DEVICE), packed.scales.to(DEVICE)
        unpack_int8_triton(codes, scales, fast[:, :columns])
        assert torch.equal(fast.cpu(), plain)
