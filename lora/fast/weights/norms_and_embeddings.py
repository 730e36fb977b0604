"""Norms and embeddings of the hand-written step: frozen, or in slots of the flat buffer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora.fast.weights.flat import FlatParameters, Slot
from lora.fast.weights.stacked_flat import StackedFlat


class WeightGroup:
    """Parameters of one shape, one from each module: frozen or, where they train, in a slot.

    Args:
        modules: whose parameters these are.
        flat: where they get their slot.
        dtype: compute dtype.
        trains: whether they train.
        decays: whether weight decay applies.
        lr_fraction: of the learning rate.
        name: of the parameter in its module.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        flat: FlatParameters | StackedFlat,
        dtype: torch.dtype,
        *,
        trains: bool,
        decays: bool = False,
        lr_fraction: float = 1.0,
        name: str = "weight",
    ) -> None:
        self.parameters = [module.get_parameter(name) for module in modules]
        self.dtype = dtype
        shape = tuple(self.parameters[0].shape)
        self.slot: Slot | None = None
        if trains:
            assert isinstance(flat, FlatParameters), "with stacked adapters nothing else trains"
            self.slot = flat.reserve((len(modules), *shape), decays=decays, lr_fraction=lr_fraction)
        else:
            self._use([parameter.data.to(dtype) for parameter in self.parameters])

    def _use(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        # The modules share the converted tensors, so that the weights are not held twice.
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            parameter.data = tensor

    def fill(self) -> None:
        """Put the values into the slot and make the parameters views of it."""
        if self.slot is None:
            return
        for parameter, view in zip(self.parameters, self.slot.values, strict=True):
            view.copy_(parameter)
            parameter.data = view
        # `to` returns the values themselves where they have the compute dtype: nothing to refresh
        # then.
        self.copies = self.slot.values.to(self.dtype)
        self.tensors = list(self.copies)

    def refresh(self) -> None:
        """Bring the copies in the compute dtype up to date with the slot."""
        if self.slot is not None and self.copies.data_ptr() != self.slot.values.data_ptr():
            self.copies.copy_(self.slot.values)
