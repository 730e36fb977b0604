"""One linear with K adapters: all rows meet one weight, and each adapter's rows its A and B."""

from __future__ import annotations

import torch
from torch import Tensor


def stacked_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    first: Tensor,
    second: Tensor,
    low: Tensor,
    out: Tensor,
) -> None:
    """Changes `low` and `out` in place: x · first, and x · weight + bias + low · second.

    `x` is (K, N, I), `weight` (I, O), `bias` (O,), `first` (K, I, R), `second` (K, R, O), `low`
    (K, N, R) and `out` (K, N, O). x, low and out may lie among other columns; the rows of an
    adapter follow those of the one before.
    """
    torch.bmm(x, first, out=low)
    rows, all_rows = x.flatten(0, 1), out.flatten(0, 1)  # views: (K·N, I), (K·N, O)
    if bias is None:
        torch.mm(rows, weight, out=all_rows)
    else:
        torch.addmm(bias, rows, weight, out=all_rows)
    out.baddbmm_(low, second)
