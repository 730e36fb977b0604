"""Triton where it is installed; without it a decorator that returns functions unchanged.

Modules with kernels import from here, so that their plain twins can be read and tested anywhere.
"""

from __future__ import annotations

import importlib.util
from typing import Any

# Triton exists for Linux with a GPU only; looking for it does not import it.
HAS_TRITON = importlib.util.find_spec("triton") is not None

if HAS_TRITON:
    import triton
    import triton.language as tl

    jit: Any = triton.jit
else:
    triton = None
    tl = None

    def jit(function: Any) -> Any:
        """Return `function` as it is: nothing compiles it, and nothing calls it."""
        return function


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()


def row_stride(x: Any) -> int:
    """Return the elements between rows of `x` (N, W), whose columns must lie side by side."""
    # Kernels take one stride: views of wider buffers have gaps between rows, never between columns.
    assert x.stride(-1) == 1, "columns must lie side by side"
    return int(x.stride(0))


@jit
def soft_cap(x, cap):
    """Return cap · tanh(x / cap), in a kernel: Triton has no tanh of its own."""
    return cap * (1 - 2 / (1 + tl.exp(2 * x / cap)))
