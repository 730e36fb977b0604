"""transformers' causal models loaded, or taken as they are, as language models of this package."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora.config import BaseWeights
from lora.decoder.language_model import LanguageModel
from lora.errors import ModelError, gather
from lora.pretrained.hf_files import StoredTensor, open_tensors, read_config
from lora.pretrained.hf_weights import FLOATS, NO_PARAMETERS
from lora.pretrained.load.architectures import find_architecture
from lora.pretrained.quantised.folder import cannot_load, describe_packed, not_packed
from lora.pretrained.quantised.linears import NOT_PACKABLE
from lora.pretrained.quantised.methods import SETTINGS_KEYS, refuse_tensors, settings_of
from lora.pretrained.quantised.stored import StoredNf4, collect_packed
from lora.pretrained.transformers_models.config import Traits, TransformersConfig
from lora.pretrained.transformers_models.four_bit import PackedWeights, unknown_to
from lora.pretrained.transformers_models.model import TransformersModel
from lora.pretrained.transformers_models.probe import probe
from lora.pretrained.transformers_models.quantiser import (
    Quantising,
    forget_quantiser,
    quantisation_config,
)
from lora.pretrained.transformers_models.quiet import quiet
from lora.pretrained.transformers_models.small_copy import refusals
from lora.terminal import escaping_log

log = escaping_log(__name__)

_OF_CHECKS = re.compile(r"^(Class v|V)alidation error for (validator|field) '\w+': (\w+Error: )?")
"""What transformers' checks of a configuration put before the reason."""


def as_language_model(model: nn.Module) -> LanguageModel:
    """Return `model` itself if it is a LanguageModel, or one of transformers' models as one.

    The wrapper shares the model's parts: both are adapted and trained together. Raises ModelError
    for any other module.
    """
    if isinstance(model, LanguageModel):
        return model
    if not is_transformers(model):
        raise ModelError(
            f"Cannot use a {type(model).__name__} as a language model. Allowed: lora's Decoder, "
            "transformers' causal models."
        )
    theirs: Any = model
    is_two_part = theirs.config.is_encoder_decoder
    if is_two_part or theirs.get_output_embeddings() is None:
        what = "an encoder-decoder" if is_two_part else "without an output head"
        raise ModelError(
            f"Cannot use a {type(model).__name__} as a language model: it is {what}. Allowed: "
            "transformers' causal language models (…ForCausalLM), and those for images and text."
        )
    traits = probe(theirs.config)
    if not traits.is_causal:
        raise ModelError(
            f"Cannot use a {type(model).__name__} as a language model: with its settings tokens "
            "see those after them, so it would learn to copy. Some models become causal with "
            "is_decoder=True in their configuration."
        )
    return TransformersModel(theirs, traits)


def is_transformers(model: object) -> bool:
    """Whether `model` is of a class of transformers; never imports transformers."""
    return any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__)


def load_transformers_model(
    folder: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    base: BaseWeights | None = None,
) -> TransformersModel:
    """Return the causal language model in `folder`, with parameters of `dtype` on `device`.

    transformers builds it and reads its safetensors files; code in the folder is never run. The
    linears of its blocks are stored as `base` says, quantised one after the other on `device` as
    they are read; what stays plain is logged.

    Raises DependencyError if transformers is not installed, ModelError for an architecture that
    `find_architecture` refuses, files that are damaged, and once for all tensors that are missing,
    unexpected, of another shape, not floating-point, or quantised and not finite.
    """
    folder = Path(folder)
    named = find_architecture(read_config(folder)).class_name
    with ExitStack() as files:  # what is damaged or quantised is said by name, before it is read
        stored = _checked_tensors(folder, files)
        how, weights = _how_stored(folder, stored, base, dtype, torch.device(device))
        with _read_by_transformers(folder) as transformers:
            if weights:
                weights["config"] = _plain_config(transformers, folder)
            theirs, report = class_of(transformers, named).from_pretrained(
                None if weights else str(folder),
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report, all of them
                quantization_config=None if how is None else quantisation_config(how),
                **weights,
            )
            if how is not None:
                _finish(how, theirs)
            traits = _checked(probe(theirs.config), folder)
    faults = [] if how is None else list(how.faults)
    if how is not None and how.packed is not None:
        faults += [f"{name} {NOT_PACKABLE}" for name in how.packed.left()]
    faults += [f"{name} is missing" for name in sorted(report["missing_keys"])]
    faults += [
        f"{name} is {tuple(seen)} in the file: config.json implies {tuple(wanted)}"
        for name, seen, wanted in sorted(report["mismatched_keys"])
    ]
    faults += [
        f"{name} is not a tensor of this architecture"
        for name in sorted(report["unexpected_keys"])
        if not NO_PARAMETERS.fullmatch(name)
    ]
    _refuse(faults + list(_untied(theirs)), folder)
    if how is not None and how.linears is not None and how.linears.plain:
        log.warning("not in %s: %s", how.base.base_dtype, how.linears.describe())
    return TransformersModel(theirs.to(device).eval(), traits)


def _finish(how: Quantising, theirs: Any) -> None:
    """Changes `theirs` in place, which transformers has loaded with `how`, while files are open."""
    forget_quantiser(theirs)
    how.restore_samples()
    others = [] if how.packed is None else how.packed.unpack_others(theirs)
    if others:
        shown = ", ".join(others[:8]) + (" …" if len(others) > 8 else "")
        log.warning("unpacked, no linears of the blocks for text: %s", shown)


def _checked_tensors(folder: Path, files: ExitStack) -> dict[str, StoredTensor | StoredNf4]:
    """Return the tensors of `folder`. Raises ModelError for those that are quantised or damaged.

    bitsandbytes' nf4 is not.
    """
    source = open_tensors(folder, files)
    refuse_tensors(source, str(folder))
    stored, faults = collect_packed(source)
    if faults:
        raise ModelError(cannot_load(folder, faults))
    faults = [
        f"{name} has dtype {tensor.dtype} (allowed: {', '.join(FLOATS)})"
        for name, tensor in stored.items()
        if tensor.dtype not in FLOATS and not NO_PARAMETERS.fullmatch(name)
    ]
    _refuse(faults, folder, "It is quantised, in whole or in part: name the unquantised model.")
    return stored


def _how_stored(
    folder: Path,
    stored: dict[str, StoredTensor | StoredNf4],
    base: BaseWeights | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Quantising | None, dict[str, Any]]:
    """Return how the linears are stored, None as they are; and what transformers is to load.

    That is empty where it reads the files itself. Raises ConfigError for a `base` that a folder in
    4 bits is not.
    """
    asked = base or BaseWeights()
    packed = {name: found for name, found in stored.items() if isinstance(found, StoredNf4)}
    if not packed:
        if settings_of(read_config(folder)) is not None:
            raise ModelError(not_packed(folder))
        return (Quantising(asked, device) if asked.is_quantised else None), {}
    settled = describe_packed(folder, packed).settled(asked)
    theirs = empty_of_config(read_transformers_config(folder)).theirs
    unknown = unknown_to((name for name, _ in theirs.named_parameters()), packed)
    advice = "Name the unquantised model: --base-dtype nf4 packs what can be."
    _refuse([f"{name} {NOT_PACKABLE}" for name in unknown], folder, advice)
    weights = PackedWeights(stored, dtype)
    return Quantising(settled, device, packed=weights), {"state_dict": weights.state_dict()}


def _plain_config(transformers: Any, folder: Path) -> Any:
    """Return transformers' configuration of `folder` without what it says of a quantisation."""
    config = transformers.AutoConfig.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
    for part in (config, config.get_text_config(decoder=True)):
        for key in SETTINGS_KEYS:
            vars(part).pop(key, None)
    return config


def _checked(traits: Traits, folder: Path) -> Traits:
    """Return `traits`. Raises ModelError if they are not those of a causal language model."""
    if not traits.is_causal:
        raise ModelError(
            f"Cannot load {folder}: with these settings in config.json its tokens see those after "
            "them, so it would learn to copy. Name a causal language model; some become one with "
            '"is_decoder": true in config.json.'
        )
    return traits


def _refuse(
    faults: list[str],
    folder: Path,
    advice: str = "Check that config.json and the weights belong together; download both again.",
) -> None:
    if faults:
        heading = f"Cannot load {folder}: its tensors do not match config.json:"
        raise ModelError(gather(faults, heading, advice))


def _untied(theirs: Any) -> Iterator[str]:
    """Yield what config.json ties and the files have two values for."""
    for name, source in theirs.get_expanded_tied_weights_keys(all_submodels=True).items():
        if theirs.get_parameter(name) is not theirs.get_parameter(source):
            yield (
                f"{name} differs from {source}, and config.json ties them (tie_word_embeddings): "
                "set that to false to use both"
            )


def class_of(transformers: Any, name: str) -> Any:
    """Return the class of transformers called `name`, one that `find_architecture` has found."""
    return getattr(transformers, name)


def read_transformers_config(folder: Path) -> TransformersConfig:
    """Return the sizes of the model in `folder`, and what was found out about its architecture.

    Raises as `load_transformers_model`; no weights are read. Found once for each config.json in a
    process; the values are shared: never change them.
    """
    return _build_config(folder, json.dumps(read_config(folder), sort_keys=True))


@functools.cache
def _build_config(folder: Path, contents: str) -> TransformersConfig:
    named = find_architecture(json.loads(contents)).class_name
    with _read_by_transformers(folder) as transformers:
        config = _plain_config(transformers, folder)
        # Sizes that do not go together are refused by the model's own code, so it is built.
        with torch.device("meta"):
            theirs = class_of(transformers, named)._from_config(config, dtype=torch.float32)
        return TransformersConfig(theirs.config, _checked(probe(theirs.config), folder))


def empty_of_config(config: TransformersConfig) -> TransformersModel:
    """Return a model of these sizes without values, in fp32; `config` stays as it is."""
    import transformers

    named, own = find_architecture(config.source).class_name, copy.deepcopy(config.theirs)
    with quiet(), torch.device("meta"):
        theirs = class_of(transformers, named)._from_config(own, dtype=torch.float32)
    return TransformersModel(theirs.eval(), config.traits)


@contextmanager
def _read_by_transformers(folder: Path | str) -> Iterator[Any]:
    """Yield the package; what it refuses inside the context is a ModelError."""
    import transformers  # `find_architecture` has seen that it can be

    try:
        with quiet():  # what it reports of the weights is raised here
            yield transformers
    except ModelError:
        raise
    except refusals() as error:
        raise ModelError(
            f"Cannot load {folder} with transformers: {_reason(error, folder)}. Check config.json, "
            "or download it again."
        ) from error


def _reason(error: BaseException, folder: Path | str) -> str:
    """Return why transformers refused the model in `folder`, in one line without a full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):  # its text is the value alone
        named = ", ".join(_fields_with(text, read_config(Path(folder))))
        return f"it does not know {named}" if named else f"KeyError: {text}"
    return _OF_CHECKS.sub("", text).rstrip(".!")


def _fields_with(text: str, config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the fields of `config` whose value is `text`, as repr writes it, with that value."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _fields_with(text, value, f"{prefix}{name}.")
        elif repr(value) == text:
            yield f"{prefix}{name}={text}"
