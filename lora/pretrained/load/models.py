"""A model's folder as a LanguageModel, whichever code runs it: read, loaded, mapped and saved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lora.config import BaseWeights, ImplementationName
from lora.decoder.config import DecoderConfig
from lora.decoder.decoder import Decoder, build_empty_decoder
from lora.decoder.families import FAMILIES, decoder_config
from lora.decoder.language_model import LanguageModel, ModelConfig
from lora.decoder.quantised.base import quantised_modules
from lora.errors import UnsupportedModelError
from lora.layers.quantised_model import use_quantised_linears
from lora.pretrained.hf_files import read_config
from lora.pretrained.hf_weights import load_decoder, map_decoder, save_decoder, write_decoder
from lora.pretrained.load.implementation import Implementation, choose_implementation
from lora.pretrained.load.originals import OriginalWeights
from lora.pretrained.mapped import MappedModel
from lora.pretrained.transformers_models.config import TransformersConfig
from lora.pretrained.transformers_models.load import (
    empty_of_config,
    load_transformers_model,
    read_transformers_config,
)
from lora.pretrained.transformers_models.model import TransformersModel
from lora.pretrained.transformers_models.quantiser import empty_quantised_linears
from lora.pretrained.transformers_models.save import save_transformers_model


def implementation_of(
    folder: Path, asked: ImplementationName = "auto", *, is_recorded: bool = False
) -> Implementation:
    """Return the code that runs the model in `folder`: see `choose_implementation`.

    `is_recorded`: it is asked for because its run has recorded it. Raises ModelError for a folder
    without a config.json too.
    """
    chosen = choose_implementation(read_config(folder), asked)
    return replace(chosen, reason="as in its run") if is_recorded else chosen


def model_config(folder: Path, asked: ImplementationName = "auto") -> ModelConfig:
    """Return the sizes of the model in `folder`, from its config.json alone.

    Raises what `implementation_of` does.
    """
    config = read_config(folder)
    if choose_implementation(config, asked).kind == "native":
        return decoder_config(config)
    return read_transformers_config(folder)


def empty_language_model(config: ModelConfig) -> LanguageModel:
    """Return a model of these sizes without values: all parameters are on the meta device."""
    if isinstance(config, TransformersConfig):
        return empty_of_config(config)
    return build_empty_decoder(as_decoder_config(config))


def quantise_empty_model(
    model: LanguageModel, base: BaseWeights, only: Collection[str] | None = None
) -> None:
    """Changes `model`, which has no values, in place: its linears are stored as `base` says.

    Those whose weights are not named in `only` stay as they are.
    """
    if not base.is_quantised:
        return
    if isinstance(model, TransformersModel):
        empty_quantised_linears(model.theirs, base, only)
    else:
        use_quantised_linears(as_decoder(model, "quantise the weights of"), base, only)


def why_not_packed(config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> str | None:
    """Return why examples in one sequence would see each other; None if they do not."""
    if isinstance(config, TransformersConfig):
        return config.traits.why_not_packed_in(compute_dtype)
    return None


def load_language_model(
    folder: Path,
    *,
    implementation: ImplementationName = "auto",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    base: BaseWeights | None = None,
) -> LanguageModel:
    """Return the model in `folder`, with parameters of `dtype` on `device`.

    The linears of its blocks are stored as `base` says, quantised as they are read.
    Raises what `implementation_of` does, and ModelError for weights that are missing, unexpected
    or damaged.
    """
    if implementation_of(folder, implementation).kind == "native":
        model = load_decoder(folder, dtype=dtype, device=device, base=base)
        if any(len(module.sample) for module in quantised_modules(model).values()):
            model.original_weight = OriginalWeights(folder)
        return model
    return load_transformers_model(folder, dtype=dtype, device=device, base=base)


def map_language_model(folder: Path, implementation: ImplementationName = "auto") -> MappedModel:
    """Return the model in `folder` on the CPU, to merge or to export; never change it in place.

    A native decoder's weights stay in their files; another is read, in fp32. Raises what
    `load_language_model` does.
    """
    if implementation_of(folder, implementation).kind == "native":
        return map_decoder(folder)
    return MappedModel(load_transformers_model(folder).requires_grad_(False))


def save_language_model(model: LanguageModel, folder: Path) -> None:
    """Write `model` into `folder` as config.json and safetensors that transformers loads.

    Raises ModelError if `model` has tensors that the format cannot hold (LoRA that was not
    merged), and CheckpointError if writing fails.
    """
    if isinstance(model, TransformersModel):
        save_transformers_model(model, folder)
    else:
        save_decoder(as_decoder(model, "save"), folder)


def write_sharded_model(
    model: LanguageModel, parts: Callable[[str], Iterator[Tensor]], folder: Path
) -> None:
    """Write a native decoder whose weights are split over processes, part by part.

    `parts` yields the rows of a parameter, called by name, in order. Raises as
    `save_language_model`, and ModelError for other models, which are never split.
    """
    decoder = as_decoder(model, "save the parts of")
    dtypes = {name: parameter.dtype for name, parameter in decoder.named_parameters()}
    write_decoder(decoder.config, dtypes, parts, folder)


def as_decoder_config(config: ModelConfig) -> DecoderConfig:
    """Return `config`, a native decoder's. Raises UnsupportedModelError for another one."""
    if isinstance(config, DecoderConfig):
        return config
    raise UnsupportedModelError(_only_native("build a decoder of", config))


def as_decoder(model: LanguageModel, verb: str) -> Decoder:
    """Return `model`, a native decoder. Raises UnsupportedModelError for another one."""
    if isinstance(model, Decoder):
        return model
    raise UnsupportedModelError(_only_native(verb, model.config))


def _only_native(verb: str, config: ModelConfig) -> str:
    return (
        f"Cannot {verb} this {config.family!r} model: that is for native decoders "
        f"({', '.join(sorted(FAMILIES))}), and transformers runs it."
    )
