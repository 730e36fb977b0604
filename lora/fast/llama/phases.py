"""Scratch of a step's phases that follow one another, in one tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

ALIGNMENT = 128
"""Tensors begin at multiples of so many values, as the allocator's begin at multiples of bytes."""


class PhaseScratch:
    """Every phase takes the tensor from its start: what another one left there is overwritten.

    Args:
        like: dtype and device.
        phases: by name, the values of each of its tensors.
    """

    def __init__(self, like: Tensor, phases: Mapping[str, Sequence[int]]) -> None:
        self._sizes = {name: [_aligned(n) for n in sizes] for name, sizes in phases.items()}
        self.tensor = like.new_empty(max(map(sum, self._sizes.values())))

    def take(self, phase: str, number: int, *shape: int) -> Tensor:
        """Return tensor `number` of a phase."""
        start = sum(self._sizes[phase][:number])
        return self.tensor[start : start + math.prod(shape)].view(shape)


def _aligned(n_values: int) -> int:
    return -(-n_values // ALIGNMENT) * ALIGNMENT
