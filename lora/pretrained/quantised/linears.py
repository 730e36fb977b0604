"""Linears of a model replaced by packed ones, with the codes and scales of a folder in 4 bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lora.decoder.decoder import Decoder
from lora.decoder.quantised.base import quantised_modules
from lora.decoder.quantised.nf4 import Nf4Linear, Nf4Weight
from lora.errors import ModelError
from lora.pretrained.hf_files import StoredTensor
from lora.pretrained.quantised.stored import Read, StoredNf4

NOT_PACKABLE = (
    "is in 4 bits: only the weights of the blocks' linears can be (name the unquantised model)"
)
VALUE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_packed_linears(
    model: nn.Module,
    packed: Mapping[str, StoredNf4],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    read: Read = StoredTensor.tensor,
) -> None:
    """Changes `model` in place: the linears of these weights become packed ones, one by one.

    Values are merged into `dtype`; None: what each was quantised from. Raises ModelError for
    scales that are not finite.
    """
    for name, weight in packed.items():
        owner, _, leaf = name.removesuffix(".weight").rpartition(".")
        parent = model.get_submodule(owner)
        linear = parent.get_submodule(leaf)
        assert isinstance(linear, nn.Linear)
        new = Nf4Linear(linear, weight.block, double_quant=weight.is_double)
        fill_packed(new, weight, dtype=dtype, device=device, read=read)
        parent.register_module(leaf, new)


def fill_packed(
    linear: Nf4Weight,
    weight: StoredNf4,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    read: Read = StoredTensor.tensor,
) -> None:
    """Changes `linear`, of the same sizes, in place: its codes and scales are those of `weight`.

    Values are merged into `dtype`; None: what they were quantised from. Raises ModelError for
    scales that are not finite.
    """
    linear.packed = weight.packed(device, read)
    linear.value_dtype = dtype or VALUE_DTYPES[weight.dtype]
    linear.sample = torch.empty(0, dtype=torch.int16, device=device)
    scales = linear.weight_group_scales if linear.double_quant else linear.weight_scales
    if not bool(torch.isfinite(scales).all()):
        raise ModelError(
            f"Cannot load {weight.path}: {weight.name} has scales that are not finite. Download it "
            "again."
        )


def use_packed_linears(model: Decoder, like: Decoder) -> None:
    """Changes `model` in place: what is packed in `like` is so in it, without values."""
    for name, module in quantised_modules(like).items():
        assert isinstance(module, Nf4Weight)
        owner, _, leaf = name.rpartition(".")
        parent = model.get_submodule(owner)
        linear = parent.get_submodule(leaf)
        assert isinstance(linear, nn.Linear)
        new = Nf4Linear(linear, module.block, double_quant=module.double_quant)
        new.comes_packed = True
        parent.register_module(leaf, new)


def packable_linears(model: Decoder) -> set[str]:
    """Return the names of the weights that may be packed: those of the linears of the blocks."""
    inside = set(model.trunk.blocks().modules())
    found = model.named_modules()
    return {f"{n}.weight" for n, m in found if isinstance(m, nn.Linear) and m in inside}
