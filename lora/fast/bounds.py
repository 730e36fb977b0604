"""Where documents begin, at an address that a captured step reads."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_ROOM_DOCUMENTS = 64
"""There is room for so many at least."""


class DocumentBounds:
    """Where each document begins among the N tokens of a batch, then N: int32, on the device."""

    def __init__(self, device: torch.device, n_tokens: int) -> None:
        self.tensor = torch.full((2,), n_tokens, dtype=torch.int32, device=device)

    def copy_in(self, offsets: Tensor) -> bool:
        """Store `offsets` (documents + 1,), on the host; return whether the address changed.

        The rest is N, documents without tokens, so that the length hardly ever changes.
        """
        n_tokens, has_moved = int(offsets[-1]), len(offsets) > len(self.tensor)
        if has_moved:
            room = max(MIN_ROOM_DOCUMENTS, 2 << (len(offsets) - 2).bit_length())
            self.tensor = self.tensor.new_empty(room + 1)
        padded = torch.full((len(self.tensor),), n_tokens, dtype=torch.int32)
        padded[: len(offsets)] = offsets
        self.tensor.copy_(pinned(padded, self.tensor.device), non_blocking=True)
        return has_moved


def pinned(source: Tensor, device: torch.device) -> Tensor:
    """Return `source` in pinned memory, from which `device` copies while the host goes on."""
    return source.pin_memory() if device.type == "cuda" and not source.is_cuda else source
