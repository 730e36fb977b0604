"""Matmuls on a CPU by whichever library, MKL or oneDNN, is faster for their size.

What differs from the textbook: torch gives fp32 matmuls to MKL. oneDNN, which torch carries too,
takes 5 to 25 % less time for large ones and less than half for those with few columns (measured on
two cores of an AMD EPYC); for the smallest ones its call costs more than it saves. It also caches
what it has prepared for every shape, about a megabyte each and far more beyond a thousand of them,
so it gets matmuls of round row counts alone: those of full batches, not those that differ from
batch to batch. The choice depends on shapes only, so that a resumed run makes the same one.

`nt` and `tn` are BLAS's: which of the two factors is transposed.
"""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor

# On x86 only: elsewhere torch's oneDNN rests on other libraries, which nobody measured.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
MIN_MULTIPLICATIONS = 2**25
"""Multiplications (N · I · O) from which oneDNN is the faster library."""
MIN_MULTIPLICATIONS_WITH_BIAS = 2**22
"""The same with a bias, which torch copies into the result before MKL adds to it."""
MAX_NARROW_COLUMNS = 64
"""A matmul with at most so many outputs is narrow: it goes to oneDNN from the next number on."""
MIN_NARROW_INPUT_ELEMENTS = 2**17
"""Elements of x."""
MIN_WIDE_COLUMNS = 512
"""A narrow lowᵀ x goes to oneDNN from so many columns of x on."""
ROUND_BITS = 2
"""Row counts that oneDNN gets have no bits beyond these leading ones: 512, 768, 1024, 1536 …"""


def matmul_nt(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weightᵀ + bias: x (N, I), weight (O, I) or a transposed (I, O), bias (O) -> (N, O).

    For use inside of autograd functions: oneDNN's operation has no gradient.
    """
    if HAS_ONEDNN and _is_faster(x, weight, bias is not None):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return F.linear(x, weight, bias)


def matmul_tn(low: Tensor, x: Tensor) -> Tensor:
    """Return lowᵀ x for a narrow low (N, R) and x (N, I) -> (R, I). For use as `matmul_nt`."""
    if (
        HAS_ONEDNN
        and x.shape[1] >= MIN_WIDE_COLUMNS
        and low.shape[1] <= MAX_NARROW_COLUMNS
        and _can_take(low, x)
    ):
        # low is narrow: transposing it costs little beside the matmul.
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            low.T.contiguous(), x.T, None, "none", [], ""
        )  # (R, I)
        return y
    return low.T @ x


def round_rows(rows: int) -> int:
    """Return the next count from `rows` on that oneDNN gets."""
    step = 1 << max(0, rows.bit_length() - ROUND_BITS)
    return -(-rows // step) * step


def _is_faster(x: Tensor, weight: Tensor, has_bias: bool) -> bool:
    if not _can_take(x, weight):
        return False
    n_elements, n_out = x.numel(), weight.shape[0]
    is_narrow = n_out <= MAX_NARROW_COLUMNS and n_elements >= MIN_NARROW_INPUT_ELEMENTS
    least = MIN_MULTIPLICATIONS_WITH_BIAS if has_bias else MIN_MULTIPLICATIONS
    return is_narrow or n_elements * n_out >= least


def _can_take(x: Tensor, weight: Tensor) -> bool:
    if round_rows(x.shape[0]) != x.shape[0]:
        return False  # a count that may never come again
    if not x.is_cpu or x.dtype is not torch.float32 or weight.dtype is not torch.float32:
        return False
    return weight.is_contiguous() or weight.mT.is_contiguous()
