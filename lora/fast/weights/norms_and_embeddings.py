"""Norms and embeddings of the fast step: frozen, or in slots of the flat buffer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora.fast.weights.flat import FlatParameters, Slot
from lora.fast.weights.stacked_flat import StackedFlat


class WeightGroup:
    """Tensors of one shape and their modules: frozen or, where they train, in a slot.

    `name` is that of the parameter in its module, `share` what it takes of the learning rate.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        flat: FlatParameters | StackedFlat,
        dtype: torch.dtype,
        *,
        trains: bool,
        decays: bool = False,
        share: float = 1.0,
        name: str = "weight",
    ) -> None:
        self.parameters = [module.get_parameter(name) for module in modules]
        self.dtype = dtype
        shape = tuple(self.parameters[0].shape)
        self.slot: Slot | None = None
        if trains:
            assert isinstance(flat, FlatParameters), "in a stack adapters train alone"
            self.slot = flat.reserve((len(modules), *shape), decays=decays, share=share)
        else:
            self._use([parameter.data.to(dtype) for parameter in self.parameters])

    def _use(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            parameter.data = tensor

    def fill(self) -> None:
        """Put the values into the slot and point the modules there."""
        if self.slot is None:
            return
        for parameter, view in zip(self.parameters, self.slot.values, strict=True):
            view.copy_(parameter)
            parameter.data = view
        # The values themselves where the products have their type: nothing to refresh then.
        self.copies = self.slot.values.to(self.dtype)
        self.tensors = list(self.copies)

    def refresh(self) -> None:
        """Bring the copies up to date with the slot."""
        if self.slot is not None and self.copies.data_ptr() != self.slot.values.data_ptr():
            self.copies.copy_(self.slot.values)
