"""Both BLAS libraries agree, whichever takes the GEMM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.kernels import matmul
from lora.kernels.matmul import matmul_nt, matmul_tn


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    n_in=st.integers(1, 70),
    n_out=st.integers(1, 70),
    with_bias=st.booleans(),
    is_transposed=st.booleans(),
    is_large=st.booleans(),
)
def test_agrees_with_torchs_linear(
    rows: int, n_in: int, n_out: int, with_bias: bool, is_transposed: bool, is_large: bool
) -> None:
    generator = torch.Generator().manual_seed(rows + n_in + n_out)
    x = torch.randn(rows, n_in, generator=generator)
    weight = torch.randn(n_out, n_in, generator=generator)
    bias = torch.randn(n_out, generator=generator) if with_bias else None
    given_weight = weight.T.contiguous().T if is_transposed else weight
    with pytest.MonkeyPatch.context() as patch:
        if is_large:  # as if the sizes were those from which oneDNN takes over
            for name in (
                "MIN_MULTIPLICATIONS",
                "MIN_MULTIPLICATIONS_WITH_BIAS",
                "MIN_NARROW_INPUT_ELEMENTS",
            ):
                patch.setattr(matmul, name, 0)
            patch.setattr(matmul, "ROUND_BITS", 64)
        y = matmul_nt(x, given_weight, bias)
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    # Against the sizes of what is added: a lone result may be a small difference of large ones.
    sizes = F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    assert y.shape == wanted.shape
    assert (y - wanted).norm() <= 1e-6 * sizes.norm()


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), rank=st.integers(1, 9), n=st.integers(1, 70), is_wide=st.booleans())
def test_transposed_matmuls_agree(rows: int, rank: int, n: int, is_wide: bool) -> None:
    generator = torch.Generator().manual_seed(rows + rank + n)
    low = torch.randn(rows, rank, generator=generator)
    x = torch.randn(rows, n, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        if is_wide:
            patch.setattr(matmul, "MIN_WIDE_COLUMNS", 1)
            patch.setattr(matmul, "ROUND_BITS", 64)
        y = matmul_tn(low, x)
    wanted = low.double().T @ x.double()
    assert y.shape == wanted.shape
    assert (y - wanted).norm() <= 1e-6 * (low.abs().T @ x.abs()).norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_and_strides_go_to_torch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(600, 300).to(dtype), torch.randn(400, 300).to(dtype)
    assert torch.equal(matmul_nt(x, weight), F.linear(x, weight))
    wide = torch.randn(400, 310)
    assert torch.equal(matmul_nt(x.float(), wide[:, :300]), F.linear(x.float(), wide[:, :300]))


GROWTH = """
import resource, torch
from pathlib import Path
from lora.kernels.matmul import matmul_nt

def held_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

weight = torch.randn(6144, 576)
matmul_nt(torch.randn(1024, 576), weight)
before = held_mb()
for rows in range(257, 1024, 12):
    matmul_nt(torch.randn(rows, 576), weight)
print(held_mb() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the system tells no memory")
def test_token_counts_that_occur_once_leave_no_memory_behind() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 100  # oneDNN would keep several times that


def test_only_round_row_counts_go_to_onednn() -> None:
    taken = [n for n in range(512, 2049) if matmul._can_take(torch.empty(n, 1), torch.empty(1, 1))]
    assert taken == [512, 768, 1024, 1536, 2048]
