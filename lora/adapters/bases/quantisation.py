"""How the base of a model is quantised, as its adapters name it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from lora.adapters.bases.linears import block_linears
from lora.adapters.fingerprint import code_fingerprint
from lora.decoder.language_model import LanguageModel
from lora.decoder.quantised.base import QuantisedWeight, quantised_modules
from lora.decoder.quantised.nf4 import Nf4Weight
from lora.decoder.quantised.record import BaseQuantisation


def quantisation_of(model: nn.Module) -> BaseQuantisation | None:
    """Return how the base of `model` is quantised, or was before it was unpacked; None: it is not.

    A model whose weights are not all in this process has its own noted.
    """
    if isinstance(model, LanguageModel) and model.known_quantisation is not None:
        return model.known_quantisation
    coded = quantised_modules(model)
    if not coded:
        return None
    found = settings_of(model, next(iter(coded.values())))
    return replace(found, fingerprint=code_fingerprint(model))


def quantisation_from(
    model: nn.Module, plain: nn.Module, release: Callable[[], None] | None = None
) -> BaseQuantisation | None:
    """Return how the base of `model` is quantised, whose codes are those of `plain` in its kind.

    For a model whose quantised linears have no values yet.
    """
    coded = quantised_modules(model)
    if not coded:
        return None
    found = settings_of(model, next(iter(coded.values())))
    return replace(found, fingerprint=code_fingerprint(plain, found, release))


def settings_of(model: nn.Module, module: QuantisedWeight) -> BaseQuantisation:
    """Return how the base of `model` is quantised, of which `module` is a part; no fingerprint."""
    linears = block_linears(model)
    nf4 = module if isinstance(module, Nf4Weight) else None
    outside = quantised_modules(model).keys() - linears.keys()
    return BaseQuantisation(
        dtype=module.kind,
        block=None if nf4 is None else nf4.block,
        double_quant=None if nf4 is None else nf4.double_quant,
        embeddings=bool(outside),
        compute_dtype=str(module.value_dtype).removeprefix("torch."),
        kept=tuple(sorted(n for n, m in linears.items() if not isinstance(m, QuantisedWeight))),
    )
