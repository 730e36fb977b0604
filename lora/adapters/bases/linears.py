"""The linears that a quantised base has in codes: which they are, their values, and some codes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora.config import BaseDtype, BaseWeights
from lora.decoder.language_model import LanguageModel
from lora.decoder.quantised.base import QuantisedWeight, sample_positions
from lora.decoder.quantised.record import BaseQuantisation
from lora.layers.conv1d import LoRAConv1D, is_conv1d
from lora.layers.quantised_model import build_quantised
from lora.layers.token_tables import HasTokenTables
from lora.lora_module import LoRALayer


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linears of the blocks by full name, adapted or not, in codes or plain.

    Of a model of other code: all but the output head.
    """
    found = {name: module for name, module in model.named_modules() if is_linear(module)}
    if isinstance(model, LanguageModel):
        inside = {id(module) for module in model.blocks().modules()}
        return {name: module for name, module in found.items() if id(module) in inside}
    return {name: module for name, module in found.items() if name.split(".")[-1] != "lm_head"}


def table_names(model: nn.Module) -> list[str]:
    """Return the full names of the embedding and the output head, where `model` says which."""
    if not isinstance(model, HasTokenTables):
        return []
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [name for name, module in model.named_modules() if any(module is t for t in tables)]


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear: plain, adapted or in codes."""
    return isinstance(module, nn.Linear | LoRALayer | QuantisedWeight) or is_conv1d(module)


@torch.no_grad()
def linear_values(module: nn.Module) -> Tensor:
    """Return the base's weight (O, I) of a linear; unpacked where it is in codes."""
    if isinstance(module, QuantisedWeight):
        return module.unpacked()
    weight = cast(Tensor, module.weight).detach()
    return weight.T if is_transposed(module) else weight


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight of `module`, a linear, is (I, O)."""
    return is_conv1d(module) or isinstance(module, LoRAConv1D)


def lacks_values(model: nn.Module) -> bool:
    """Whether each process gets its shard of the weights later, and no values are here yet."""
    weights = model.parameters()
    return any(p.is_meta or (p.numel() > 1 and not any(p.stride())) for p in weights)


def weights_of(kind: BaseQuantisation) -> BaseWeights:
    """Return the settings that load a base of this kind."""
    given = {"nf4_block": kind.block, "nf4_double_quant": kind.double_quant}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return BaseWeights(
        base_dtype=cast(BaseDtype, kind.dtype), nf4_embeddings=kind.embeddings, **settings
    )


def default_kind(dtype: str) -> BaseQuantisation:
    """Return what `dtype` alone stands for: in nf4 with the default blocks and scales."""
    if dtype != "nf4":
        return BaseQuantisation(dtype)
    return BaseQuantisation(dtype, BaseWeights.nf4_block, BaseWeights.nf4_double_quant)


def packed(weight: Tensor, kind: BaseQuantisation, name: str) -> QuantisedWeight:
    """Return `weight` (O, I) in codes, as a base of this kind has it."""
    with torch.device("meta"):
        like = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module = build_quantised(like, name, replace(weights_of(kind), nf4_embeddings=False))
    module.load(weight.to(kind.torch_dtype).contiguous(), name)
    return module


@torch.no_grad()
def rounded(weight: Tensor, kind: BaseQuantisation, name: str) -> Tensor:
    """Return the values that `weight` (O, I) has in a base of this kind, in its compute dtype."""
    return packed(weight, kind, name).unpacked()


@torch.no_grad()
def sample_codes(module: QuantisedWeight) -> Tensor:
    """Return codes of `module` at the positions of `sample_values`, int16."""
    shape = module.out_features, module.in_features
    return _codes_at(module, *sample_positions(shape, module.weight.device))


@torch.no_grad()
def sample_codes_of(weight: Tensor, kind: BaseQuantisation, name: str) -> Tensor:
    """Return what `sample_codes` would, were the plain `weight` (O, I) in codes of this kind.

    Only rows, or blocks of nf4, that have a sampled value are read.
    """
    rows, columns = sample_positions(weight.shape, weight.device)
    if kind.block is None:
        own = torch.arange(len(rows), device=weight.device)
        return _codes_at(packed(weight[rows], kind, name), own, columns)
    flat, block = rows * weight.shape[1] + columns, kind.block
    first = flat // block * block
    is_whole = first + block <= weight.numel()  # the last block may be shorter
    found = torch.empty_like(flat, dtype=torch.int16)
    for chosen in (is_whole, ~is_whole):
        if bool(chosen.any()):
            starts, own = first[chosen].unique(return_inverse=True)  # there is one shorter block
            length = min(block, weight.numel() - int(starts[0]))
            inside = starts[:, None] + torch.arange(length, device=weight.device)
            blocks = weight[torch.unravel_index(inside, weight.shape)]  # (n, length)
            columns = flat[chosen] - first[chosen]
            found[chosen] = _codes_at(packed(blocks, kind, name), own, columns)
    return found


def _codes_at(module: QuantisedWeight, rows: Tensor, columns: Tensor) -> Tensor:
    codes = module.weight.detach()
    if module.kind != "nf4":
        return codes.view(torch.int8)[rows, columns].to(torch.int16)
    pairs = codes[rows, columns // 2].to(torch.int16)
    return torch.where(columns % 2 == 0, pairs >> 4, pairs & 15)
