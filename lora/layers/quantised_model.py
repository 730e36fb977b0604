"""A model's linears replaced by quantised ones, before their weights are read."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import cast

from torch import nn

from lora.config import BaseWeights
from lora.decoder.decoder import Decoder
from lora.decoder.quantised.base import QuantisedWeight
from lora.decoder.quantised.fp8 import Fp8Linear
from lora.decoder.quantised.int8 import Int8Linear
from lora.decoder.quantised.nf4 import Nf4Linear, check_even
from lora.decoder.quantised.tables import Nf4Embedding
from lora.errors import ModelError

_IN_BLOCK = re.compile(r"\w+\.\d+\..+")


def use_quantised_linears(
    model: Decoder, base: BaseWeights, only: Collection[str] | None = None
) -> None:
    """Changes `model` in place: its blocks' linears become quantised ones without values.

    Norms and biases keep their dtype, the embedding and the output head too unless
    `base.nf4_embeddings` says otherwise; so do linears whose weights are not named in `only`.
    Nothing changes where `base` is not quantised. Raises ModelError for a linear that the dtype
    cannot hold.
    """
    if not base.is_quantised:
        return
    names = {id(module): name for name, module in model.named_modules()}
    blocks = model.trunk.blocks()
    linears = {names[id(m)]: m for m in blocks.modules() if isinstance(m, nn.Linear)}
    found = with_weights_in(linears, only)
    new = {id(linears[name]): build_quantised(linears[name], name, base) for name in found}
    for owner in list(blocks.modules()):
        for name, child in list(owner.named_children()):
            if id(child) in new:
                owner.add_module(name, new[id(child)])
    if base.nf4_embeddings:
        _use_nf4_tables(model, base)


def _use_nf4_tables(model: Decoder, base: BaseWeights) -> None:
    """Changes `model` in place: embedding and output head become nf4 without values, tied or not"""
    embedding = cast(nn.Embedding, model.trunk.embedding())
    name = next(name for name, module in model.named_modules() if module is embedding)
    owner, _, leaf = name.rpartition(".")
    table = Nf4Embedding(embedding, base.nf4_block, double_quant=base.nf4_double_quant)
    model.get_submodule(owner).add_module(leaf, table)
    model.add_module("lm_head", build_quantised(model.lm_head, "lm_head", base))
    model.tie_head()


def with_weights_in(linears: Iterable[str], only: Collection[str] | None) -> list[str]:
    """Return those of `linears` whose weights are named in `only`; None: all are.

    Files of some models leave out parts of a name before the blocks, or have them in another order.
    """
    if only is None:
        return list(linears)
    starts: dict[str, list[set[str]]] = {}
    for name in only:
        start, rest = _parted(name)
        starts.setdefault(rest, []).append(start)
    found = []
    for name in linears:
        own, rest = _parted(f"{name}.weight")
        if any(start <= own for start in starts.get(rest, ())):
            found.append(name)
    return found


def _parted(name: str) -> tuple[set[str], str]:
    """Return the parts of a name before the list of blocks, and all from there on."""
    match = _IN_BLOCK.search(name)
    if match is None:
        return set(), name
    return set(name[: match.start()].split(".")) - {""}, match.group()


def build_quantised(linear: nn.Linear, name: str, base: BaseWeights) -> QuantisedWeight:
    """Return a quantised linear without values in place of `linear`, which is called `name`."""
    if base.base_dtype == "fp8":
        return Fp8Linear(linear)
    if base.base_dtype == "int8":
        return Int8Linear(linear)
    if base.base_dtype == "nf4":
        check_even(linear, name)
        return Nf4Linear(linear, base.nf4_block, double_quant=base.nf4_double_quant)
    raise ModelError(f"Cannot store weights in {base.base_dtype!r}. Allowed: fp8, int8, nf4.")
