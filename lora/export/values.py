"""The values that a model's linears and tables have where it is exported: those trained over.

A model that is mapped from its files has them as they were before quantisation: they are rounded
here, one tensor at a time. One that is packed is unpacked the same way.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from lora.adapters.bases.linears import block_linears, linear_values, packed, rounded, table_names
from lora.decoder.decoder import Decoder
from lora.decoder.quantised.base import QuantisedWeight
from lora.decoder.quantised.record import BaseQuantisation
from lora.lora_module import LoRALayer, LoRALinear


class BaseValues:
    """The base's weights of a decoder by the names of their modules.

    Args:
        model: the decoder, plain or packed, with LoRA or without.
        kind: how plain weights are rounded; None: they stay as they are.
        device: where they are rounded.
    """

    def __init__(self, model: Decoder, kind: BaseQuantisation | None, device: torch.device) -> None:
        self._model, self._kind, self._device = model, kind, device
        self._tables: dict[int, QuantisedWeight] = {}
        plain = set(block_linears(model)) if kind is not None else set()
        plain -= set(kind.kept) if kind is not None else set()
        plain |= set(table_names(model)) if kind is not None and kind.embeddings else set()
        modules = dict(model.named_modules())
        self._names = {
            id(module): name
            for name, module in modules.items()
            if name in plain or isinstance(module, QuantisedWeight)
        }

    def changes(self, module: nn.Module) -> bool:
        """Whether the weight of `module` here is not the tensor that the module has."""
        return id(module) in self._names

    def of(self, module: nn.Module) -> Tensor:
        """Return the weight (O, I) of `module`, in the dtype that it was trained in."""
        if isinstance(module, QuantisedWeight) or self._kind is None or not self.changes(module):
            return linear_values(module)
        weight = linear_values(module).to(self._device)
        return rounded(weight, self._kind, self._names[id(module)])

    def shape(self, name: str, parameter: Tensor) -> tuple[int, ...]:
        """Return the shape of the values of `parameter`, which is called `name`."""
        owner, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(owner)
        is_coded = isinstance(module, QuantisedWeight) and leaf == "weight"
        return self.shape_of(module) if is_coded else tuple(parameter.shape)

    def shape_of(self, module: nn.Module) -> tuple[int, ...]:
        """Return the shape of the values of the weight of `module`."""
        if isinstance(module, QuantisedWeight):
            return module.out_features, module.in_features
        return tuple(cast(Tensor, module.weight).shape)

    def rows(self, table: nn.Module, first: int, last: int) -> Tensor:
        """Return rows of a token table (V, C), from `first` up to `last`."""
        coded = self._coded(table)
        if coded is None:
            return cast(Tensor, table.weight).detach()[first:last]
        out = torch.empty(last - first, coded.in_features, dtype=coded.value_dtype)
        out = out.to(coded.weight.device)
        coded.unpack_into(out, first)
        return out

    def picked_rows(self, table: nn.Module, ids: Tensor) -> Tensor:
        """Return the rows `ids` of a token table (V, C)."""
        if self._coded(table) is None:
            weight = cast(Tensor, table.weight).detach()
            return weight[ids.to(weight.device)]
        return torch.cat([self.rows(table, number, number + 1) for number in ids.tolist()])

    def _coded(self, table: nn.Module) -> QuantisedWeight | None:
        """Return `table` in codes, if its values are those of codes; a tied one is packed once."""
        if isinstance(table, QuantisedWeight) or self._kind is None or not self.changes(table):
            return table if isinstance(table, QuantisedWeight) else None
        weight = cast(Tensor, table.weight).detach()
        if id(table.weight) not in self._tables:
            name = self._names[id(table)]
            self._tables[id(table.weight)] = packed(weight.to(self._device), self._kind, name)
        return self._tables[id(table.weight)]

    def plain(self, module: nn.Module) -> nn.Module:
        """Return a copy of the linear `module` in fp32 with plain values, and its LoRA in fp32."""
        weight = self.of(module)
        wide = torch.promote_types(weight.dtype, torch.float32)
        with torch.device("meta"):  # no storage, and nothing is drawn: all is replaced at once
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
            plain: nn.Module = linear
            if isinstance(module, LoRALayer):
                plain = LoRALinear(linear, module.rank, module.alpha, scaling=module.scaling)
        plain.register_parameter("weight", nn.Parameter(weight.to(wide), requires_grad=False))
        beside = {"bias": module.bias}
        if isinstance(module, LoRALayer):
            beside |= {"lora_A": module.lora_A, "lora_B": module.lora_B}
        for name, tensor in beside.items():
            if isinstance(tensor, Tensor):
                own = nn.Parameter(tensor.detach().to(wide), requires_grad=False)
                plain.register_parameter(name, own)
        return plain
