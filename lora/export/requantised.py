"""A merged model in 4 bits again: how far its logits then are, and its folder.

Rounding W + s·B·A to nf4 moves most weights by more than the adapter did, so this is measured first
and written on request only.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from lora.adapters.bases.linears import block_linears, packed, rounded
from lora.decoder.quantised.nf4 import Nf4Weight
from lora.decoder.quantised.record import BaseQuantisation
from lora.errors import UnsupportedModelError
from lora.export.blockwise import DecoderBlocks
from lora.kernels.nf4 import Nf4Tensor
from lora.lora_module import LoRALayer
from lora.pretrained.hf_weights import file_layout
from lora.pretrained.quantised.write import PackedWeight, write_4bit_folder
from lora.runs.tensor_files import TensorParts


class RequantisedBlocks:
    """A decoder whose adapter is merged and whose blocks' linears are then rounded to nf4.

    Those that `kind` keeps stay plain. Raises UnsupportedModelError for files that hold linears
    transposed.
    """

    def __init__(self, merged: DecoderBlocks, kind: BaseQuantisation) -> None:
        self.config, self._merged, self._kind = merged.config, merged, kind
        self._names = block_linears(merged.model).keys() - set(kind.kept)
        if any(self.config.is_transposed_in_files(f"{name}.weight") for name in self._names):
            raise UnsupportedModelError(
                f"Cannot merge this {self.config.family!r} model into nf4: its files hold linears "
                "transposed, and 4-bit files of bitsandbytes do not. Leave dtype nf4 out."
            )
        blocks = list(merged.model.trunk.blocks())
        self._prefixes = [n for n, m in merged.model.named_modules() if m in blocks]

    def embed(self, ids: Tensor) -> Tensor:
        return self._merged.embed(ids)

    def outside(self) -> dict[str, nn.Module]:
        return self._merged.outside()

    def head(self, hidden: Tensor) -> Tensor:
        return self._merged.head(hidden)

    def block(self, number: int) -> nn.Module:
        block, prefix = self._merged.block(number), self._prefixes[number]
        for path, module in list(block.named_modules()):
            name = f"{prefix}.{path}"
            if name in self._names:
                plain = module.merge() if isinstance(module, LoRALayer) else module
                weight = cast(Tensor, plain.weight)
                values = rounded(weight, self._kind, name).to(weight)
                plain.weight = nn.Parameter(values, requires_grad=False)
                owner, _, child = path.rpartition(".")
                block.get_submodule(owner).add_module(child, plain)
        return block

    def write(self, dtypes: dict[str, torch.dtype], folder: Path) -> None:
        """Write the model into `folder` as transformers writes 4-bit ones, tensor by tensor.

        What stays plain has its dtype of `dtypes`, by name. Raises CheckpointError if it fails.
        """
        weights: dict[str, TensorParts | PackedWeight] = {}
        for name, shape in self._merged.shapes.items():
            owner, _, leaf = name.rpartition(".")
            if owner in self._names and leaf == "weight":
                block, is_double = cast(int, self._kind.block), bool(self._kind.double_quant)
                sizes, pack = (shape[0], shape[1]), partial(self._pack, name)
                weights[name] = PackedWeight(sizes, self._kind.torch_dtype, block, is_double, pack)
            else:
                parts = self._merged.parts
                weights[name] = file_layout(self.config, name, shape, dtypes[name], parts)
        write_4bit_folder(
            self.config.source,
            weights,
            folder,
            plain_linears=("lm_head", *self._kind.kept),
            compute_dtype=self._kind.torch_dtype,
        )

    def _pack(self, name: str) -> Nf4Tensor:
        weight = self._merged.value(name)
        return cast(Nf4Weight, packed(weight, self._kind, name)).packed
