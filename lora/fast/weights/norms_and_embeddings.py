"""Norms and token tables of the hand-written step: frozen, or in slots of the flat buffer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora.fast.weights.flat import FlatParameters, Slot
from lora.fast.weights.stacked_flat import StackedFlat


class WeightGroup:
    """Parameters of one shape, one from each module: those that require gradients have a slot.

    Args:
        modules: whose parameters these are.
        flat: where they get their slot.
        dtype: compute dtype.
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
        decays: bool = False,
        lr_fraction: float = 1.0,
        name: str = "weight",
    ) -> None:
        parameters = [module.get_parameter(name) for module in modules]
        self.dtype = dtype
        self.trained = {i: p for i, p in enumerate(parameters) if p.requires_grad}
        """By its number in the group; the slot has them in this order."""
        self.slot: Slot | None = None
        if self.trained:
            assert isinstance(flat, FlatParameters), "with stacked adapters nothing else trains"
            shape = len(self.trained), *parameters[0].shape
            self.slot = flat.reserve(shape, decays=decays, lr_fraction=lr_fraction)
        self.tensors = [p.data if p.requires_grad else self._convert(p) for p in parameters]
        """In the compute dtype, as the step reads them; what trains is there after `fill`."""

    def _convert(self, parameter: nn.Parameter) -> Tensor:
        # The module shares the converted tensor, so that the weight is not held twice.
        parameter.data = parameter.data.to(self.dtype)
        return parameter.data

    def gradient(self, number: int) -> Tensor | None:
        """Return where the gradient of a parameter is summed; None: it is frozen."""
        if self.slot is None or number not in self.trained:
            return None
        return self.slot.gradients[list(self.trained).index(number)]

    def fill(self) -> None:
        """Put the values into the slot and make the parameters views of it."""
        if self.slot is None:
            return
        for parameter, view in zip(self.trained.values(), self.slot.values, strict=True):
            view.copy_(parameter)
            parameter.data = view
        # `to` returns the values themselves where they have the compute dtype: nothing to refresh
        # then.
        self.copies = self.slot.values.to(self.dtype)
        for number, copied in zip(self.trained, self.copies, strict=True):
            self.tensors[number] = copied

    def refresh(self) -> None:
        """Bring the copies in the compute dtype up to date with the slot."""
        if self.slot is not None and self.copies.data_ptr() != self.slot.values.data_ptr():
            self.copies.copy_(self.slot.values)
