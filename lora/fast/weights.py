"""Norm weights and embeddings of the fast step: frozen, or in slots of the flat buffer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora.fast.flat import FlatParameters, Slot
from lora.fast.projections import weight_of
from lora.fast.stacked_flat import StackedFlat


class Weights:
    """Tensors of one shape and their modules: frozen or, in full fine-tuning, in a slot."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        flat: FlatParameters | StackedFlat,
        dtype: torch.dtype,
        *,
        trains: bool,
        decays: bool = False,
    ) -> None:
        self.modules, self.dtype = modules, dtype
        shape = tuple(weight_of(modules[0]).shape)
        self.slot: Slot | None = None
        if trains:
            self.slot = flat.reserve((len(modules), *shape), decays=decays)
        else:
            self._use([weight_of(m).data.to(dtype) for m in modules])

    def _use(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        for module, tensor in zip(self.modules, tensors, strict=True):
            weight_of(module).data = tensor

    def fill(self) -> None:
        """Put the values into the slot and point the modules there."""
        if self.slot is None:
            return
        for module, view in zip(self.modules, self.slot.values, strict=True):
            view.copy_(weight_of(module))
            weight_of(module).data = view
        self.copies = self.slot.values.to(self.dtype)
        self.tensors = list(self.copies)

    def refresh(self) -> None:
        """Bring the copies up to date with the slot."""
        if self.slot is not None:
            self.copies.copy_(self.slot.values)
