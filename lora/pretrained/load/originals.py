"""Weights of a quantised decoder as they are in its files: only compared with, one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lora.pretrained.hf_weights import map_decoder
from lora.pretrained.mapped import MappedModel


class OriginalWeights:
    """Returns the weight (O, I) of a linear, by its name, in the dtype of the file in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mapped: MappedModel | None = None

    def __call__(self, name: str) -> Tensor:
        if self._mapped is None:
            self._mapped = map_decoder(self._folder)
        for file in self._mapped.files:
            file.check_size()
        weight = self._mapped.model.get_parameter(f"{name}.weight").detach().clone()
        self._mapped.release()
        return weight

    def __deepcopy__(self, memo: dict[int, Any]) -> OriginalWeights:
        return self  # mapped files cannot be copied, and nothing here changes
