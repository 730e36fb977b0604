"""Weights that are split over processes by rows, and where their values come from."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Rows = Callable[[str, slice], Tensor]
"""(a parameter's full name, rows along its first dimension) -> those rows, on the CPU.

In any floating-point dtype; the tensor is the caller's own.
"""

ALL_ROWS = slice(None)
