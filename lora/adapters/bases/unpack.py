"""A quantised base as plain linears of the same values: as fast as any other base."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import nn

from lora.adapters.apply import replace_module
from lora.adapters.bases.linears import block_linears, is_transposed, linear_values, rounded
from lora.adapters.bases.quantisation import quantisation_of
from lora.adapters.fingerprint import base_fingerprint, code_fingerprint
from lora.decoder.language_model import LanguageModel
from lora.decoder.quantised.base import quantised_modules
from lora.decoder.quantised.record import BaseQuantisation


@torch.no_grad()
def unpack_base(model: LanguageModel, dtype: torch.dtype) -> None:
    """Changes `model`, which has no LoRA, in place: its linears are plain, in `dtype`.

    The values are those of the codes, rounded as they are in training. One linear after the other
    is unpacked, so no more than one of them is in memory twice. Adapters of the model still name
    the quantisation.
    """
    kind, fingerprint = quantisation_of(model), base_fingerprint(model)
    for name, module in quantised_modules(model).items():
        replace_module(model, name, module.plain_layer(module.unpacked().to(dtype)))
    model.known_quantisation, model.known_fingerprint = kind, fingerprint


@torch.no_grad()
def round_base(model: LanguageModel, kind: BaseQuantisation) -> None:
    """Changes `model`, which is plain and has no LoRA, in place: its linears get rounded values.

    They are those of a base of this kind, in the same dtype as before.
    """
    fingerprint, codes = base_fingerprint(model), code_fingerprint(model, kind)
    for name, module in block_linears(model).items():
        if name not in kind.kept:
            weight = cast(nn.Parameter, module.weight)
            values = rounded(linear_values(module), kind, name)
            weight.copy_(values.T if is_transposed(module) else values)
    model.known_quantisation = replace(kind, fingerprint=codes)
    model.known_fingerprint = fingerprint
