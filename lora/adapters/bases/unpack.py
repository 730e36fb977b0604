"""A quantised base as plain linears of the same values: as fast as any other base."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import nn

from lora.adapters.apply import replace_module
from lora.adapters.bases.linears import (
    block_linears,
    is_transposed,
    linear_values,
    rounded,
    table_names,
)
from lora.adapters.bases.quantisation import quantisation_of
from lora.adapters.fingerprint import base_fingerprint, code_fingerprint
from lora.decoder.language_model import LanguageModel
from lora.decoder.quantised.base import QuantisedWeight, quantised_modules
from lora.decoder.quantised.record import BaseQuantisation


@torch.no_grad()
def unpack_base(model: LanguageModel, dtype: torch.dtype) -> None:
    """Changes `model`, which has no LoRA, in place: its linears are plain, in `dtype`.

    The values are those of the codes, rounded as they are in training. One linear after the other
    is unpacked, so no more than one of them is in memory twice. Adapters of the model still name
    the quantisation.
    """
    kind, fingerprint = quantisation_of(model), base_fingerprint(model)
    table = model.get_input_embeddings()
    codes = table.weight if isinstance(table, QuantisedWeight) else None
    for name, module in quantised_modules(model).items():
        # A tied head follows the embedding, which comes before it.
        is_tied = module is not table and module.weight is codes
        shared = cast(nn.Parameter, model.get_input_embeddings().weight) if is_tied else None
        plain = module.plain_layer(module.unpacked().to(dtype) if shared is None else shared)
        if shared is not None:
            plain.weight = shared
        replace_module(model, name, plain)
    model.known_quantisation, model.known_fingerprint = kind, fingerprint


@torch.no_grad()
def round_base(model: LanguageModel, kind: BaseQuantisation) -> None:
    """Changes `model`, which is plain, in place: its weights get rounded values.

    They are those of a base of this kind, in the same dtype as before.
    """
    fingerprint, codes = base_fingerprint(model), code_fingerprint(model, kind)
    names = [*block_linears(model), *(table_names(model) if kind.embeddings else ())]
    done: set[int] = set()  # a tied head's weight is the embedding's
    for name in names:
        module = model.get_submodule(name)
        weight = cast(nn.Parameter, module.weight)
        if name not in kind.kept and id(weight) not in done:
            done.add(id(weight))
            values = rounded(linear_values(module), kind, name)
            weight.copy_(values.T if is_transposed(module) else values)
    model.known_quantisation = replace(kind, fingerprint=codes)
    model.known_fingerprint = fingerprint
