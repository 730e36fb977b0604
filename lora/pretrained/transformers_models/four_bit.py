"""Folders in 4 bits as transformers reads them: its own code never sees codes and scales.

It gets the plain tensors, and in place of each packed weight a stand-in of the same shape that has
no memory. Our quantiser knows a stand-in again when transformers has found its linear, under
whatever name, and puts the packed weight there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lora.pretrained.hf_files import StoredTensor
from lora.pretrained.quantised.stored import StoredNf4

_NUMBER = re.compile(r"(?:^|\.)\d+(?=\.)")


class PackedWeights:
    """The packed weights of a folder, and a stand-in for each.

    Args:
        stored: the folder's tensors, in open files.
        dtype: that of the stand-ins: transformers copies what it has to cast.
    """

    def __init__(self, stored: Mapping[str, StoredTensor | StoredNf4], dtype: torch.dtype) -> None:
        self._stored, self.dtype = stored, dtype
        self._stand_ins: dict[str, Tensor] = {}
        self._by_address: dict[int, StoredNf4] = {}
        for name, weight in stored.items():
            if isinstance(weight, StoredNf4):
                stand_in = torch.zeros((), dtype=dtype).expand(weight.shape)
                self._stand_ins[name] = stand_in
                self._by_address[stand_in.data_ptr()] = weight

    def state_dict(self) -> dict[str, Tensor]:
        """Return what transformers is to load, mapped from the files."""
        plain = {n: t.tensor() for n, t in self._stored.items() if isinstance(t, StoredTensor)}
        return plain | self._stand_ins

    def take(self, tensor: Tensor) -> StoredNf4 | None:
        """Return the weight that `tensor` stands for, once; None: it is a plain one."""
        return self._by_address.pop(tensor.data_ptr(), None)

    @torch.no_grad()
    def unpack_others(self, theirs: nn.Module) -> list[str]:
        """Changes `theirs` in place: parameters that are stand-ins still get their values.

        They are no linears of the text part's blocks, such as those of a tower for images. Returns
        their names.
        """
        found = []
        for name, parameter in list(theirs.named_parameters()):
            stored = self.take(parameter)
            if stored is not None:
                owner, _, key = name.rpartition(".")
                values = nn.Parameter(stored.unpacked(parameter.dtype))
                setattr(theirs.get_submodule(owner), key, values)
                found.append(name)
        return found

    def left(self) -> list[str]:
        """Return the names of the packed weights that nobody took."""
        return [weight.name for weight in self._by_address.values()]


def unknown_to(parameters: Iterable[str], packed: Iterable[str]) -> list[str]:
    """Return those of the packed weights of experts that no parameter of a model can take.

    transformers joins experts: of stand-ins it would make one with memory. Files may have other
    names than the model, so what follows the last number counts: the linear within its expert.
    """
    known = {_within_block(name) for name in parameters}
    numbered = (name for name in packed if len(_NUMBER.findall(name)) > 1)
    return [name for name in numbered if _within_block(name) not in known]


def _within_block(name: str) -> str:
    return _NUMBER.split(name)[-1]
