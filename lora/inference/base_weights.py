"""Which values of the base's weights a model answers with, and whether they stay packed.

auto takes the values that the adapter was trained over. They are unpacked when the model is loaded,
into the compute dtype, so that answers come as fast as over plain weights; where memory has no room
for that, they stay packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lora.adapters.bases.linears import weights_of
from lora.adapters.bases.rules import trained_base_of
from lora.adapters.bases.unpack import round_base, unpack_base
from lora.config import BaseDtype, BaseWeights, ImplementationName
from lora.decoder.language_model import LanguageModel
from lora.decoder.quantised.base import base_kind, quantised_modules
from lora.decoder.quantised.record import BaseQuantisation
from lora.decoder.quantised.tables import Nf4Embedding
from lora.device import DeviceChoice, free_bytes
from lora.lora_module import n_values
from lora.pretrained.load.models import load_language_model, model_config
from lora.pretrained.load.task import check_native_only
from lora.pretrained.quantised.folder import check_answer_dtype, is_folder_in_4bit

MEMORY_FRACTION = 0.8
"""Of the free memory: what unpacked weights may take."""


@dataclass(frozen=True)
class AnswerBase:
    """How a base is loaded to answer."""

    weights: BaseWeights
    load_dtype: torch.dtype
    """Of the weights as they are read, before they are quantised."""
    dtype: torch.dtype
    """Of what is not packed, once all is loaded."""
    may_unpack: bool = False
    """Whether quantised weights are unpacked if memory has room."""
    rounded_as: BaseQuantisation | None = None
    """Of a kind that is not packed here: the weights are loaded plain, and rounded."""


def choose_answer_base(
    asked: BaseDtype,
    adapter: Path | None,
    folder: Path,
    choice: DeviceChoice,
    *,
    is_native: bool = True,
) -> AnswerBase:
    """Return how the base in `folder` is loaded for `adapter`, which is in a directory, or None.

    Raises ConfigError for a word that is not allowed, or that a folder in 4 bits cannot follow.
    """
    check_answer_dtype(asked)
    trained = trained_base_of(adapter).quantisation
    compute, is_auto = choice.compute_dtype, asked == "auto"
    if is_folder_in_4bit(folder, asked):
        return AnswerBase(BaseWeights(), compute, compute, may_unpack=is_auto)
    if asked == "original" or (is_auto and trained is None):
        return AnswerBase(BaseWeights(), torch.float32, torch.float32)
    if trained is None or asked not in ("auto", trained.dtype):
        packed = BaseWeights(base_dtype=asked)
        return AnswerBase(packed, compute, compute)
    if is_auto and (trained.kept or (trained.embeddings and not is_native)):
        return AnswerBase(BaseWeights(), trained.torch_dtype, compute, rounded_as=trained)
    return AnswerBase(weights_of(trained), trained.torch_dtype, compute, may_unpack=is_auto)


def base_of_training(adapter: Path) -> BaseWeights:
    """Return how plain files are stored to have the values that an adapter was trained over.

    As they are where nothing tells, or some linears of the blocks were kept plain: settings do not
    name these.
    """
    trained = trained_base_of(adapter).quantisation
    return BaseWeights() if trained is None or trained.kept else weights_of(trained)


def load_answer_base(
    folder: Path, implementation: ImplementationName, choice: DeviceChoice, base: AnswerBase
) -> tuple[LanguageModel, str | None]:
    """Return the model in `folder`, and a note if it stays packed because memory has no room."""
    if base.weights.is_quantised:
        check_native_only(model_config(folder, implementation), base=base.weights, fsdp=False)
    free = free_bytes(choice.device)
    model = load_language_model(
        folder,
        implementation=implementation,
        dtype=base.load_dtype,
        device=choice.device,
        base=base.weights,
    )
    note = None
    if base.rounded_as is not None:
        round_base(model, base.rounded_as)
    elif base.may_unpack and base_kind(model) is not None:
        needed = unpacked_bytes(model, base.dtype)
        if needed <= free * MEMORY_FRACTION:
            unpack_base(model, base.dtype)
        else:
            note = (
                f"the base stays packed in {base_kind(model)}: unpacked it would take "
                f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. The values are the "
                "same; answers take longer"
            )
    _cast(model, base.dtype)
    return model, note


def unpacked_bytes(model: LanguageModel, dtype: torch.dtype) -> int:
    """Return the bytes of all weights of `model`, packed or plain, once they are in `dtype`."""
    return sum(n_values(parameter) for parameter in model.parameters()) * dtype.itemsize


def _cast(model: LanguageModel, dtype: torch.dtype) -> None:
    """Changes `model` in place: parameters that are no codes get `dtype`, and what is looked up."""
    quantised = quantised_modules(model).values()
    coded = {id(module.weight) for module in quantised}
    for module in quantised:
        if isinstance(module, Nf4Embedding):
            module.out_dtype = dtype
    for parameter in model.parameters():
        if id(parameter) not in coded and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
