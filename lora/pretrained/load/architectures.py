"""Which class of the installed transformers runs a config.json, or why none of them does.

Only classes that transformers itself has: code beside the weights (auto_map) never runs.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from typing import Any

from lora.decoder.families import FAMILIES
from lora.errors import DependencyError, ModelError, did_you_mean
from lora.pretrained.quantised.methods import is_4bit
from lora.settings.install import install, install_extra

MIN_TRANSFORMERS = (5, 4)
"""Of the extra `hf` in pyproject.toml."""
_HEADS = {
    "ForSequenceClassification": "a classification head",
    "ForTokenClassification": "a head that labels tokens",
    "ForQuestionAnswering": "a head that marks answers",
    "ForMultipleChoice": "a head that chooses among answers",
    "ForMaskedLM": "a masked language model's head, which fills gaps",
    "ForPreTraining": "a head for pretraining tasks",
    "Model": "no output head: it returns hidden states, as for embeddings",
}
"""By the end of a class's name: what it has in place of the head of a causal language model."""


@dataclass(frozen=True)
class Architecture:
    """A class of transformers that is a causal language model, or has one for its text."""

    class_name: str
    is_multimodal: bool = False
    """Whether the checkpoint has towers for images or sound beside the text part."""


def transformers_version() -> str | None:
    """Return the version of the installed transformers; None if it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None


def find_architecture(config: dict[str, Any]) -> Architecture:
    """Return the class of transformers that runs the model of a config.json.

    Raises DependencyError without a transformers that is new enough, and ModelError for a model
    that is quantised, is no causal language model, or needs code that transformers does not have.
    """
    described = describe_architecture(config)
    is_4bit(config, described)  # raises for every other method
    version = _checked_version(described, config.get("model_type"))
    model_type = _known_type(config, described, version)
    from transformers.models.auto import modeling_auto

    causal = _class_name(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type))
    whole = _class_name(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type))
    named = _named_class(config) or causal or whole
    if _is_encoder_decoder(config, model_type):
        raise ModelError(
            f"Cannot load this {described}: it is an encoder-decoder, and only decoders of text "
            f"are trained here: causal language models. {_KINDS}"
        )
    if named is not None and named == whole:
        return Architecture(named, is_multimodal=True)
    if named is None or named != causal:
        raise ModelError(_other_task(described, named or "", causal))
    if model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and (
        config.get("is_decoder") is not True
    ):
        raise ModelError(
            f"Cannot load this {described}: it is a masked language model, whose tokens see those "
            f"after them (is_decoder is not true in config.json). {_KINDS}"
        )
    return Architecture(named)


_KINDS = "Name a causal language model, one with …ForCausalLM among its architectures."


def describe_architecture(config: dict[str, Any]) -> str:
    """Return model_type and class in words, for messages."""
    named = _named_class(config)
    model_type = config.get("model_type")
    kind = f"{model_type!r} model" if isinstance(model_type, str) else "model without a model_type"
    return kind if named is None else f"{kind} ({named})"


def _named_class(config: dict[str, Any]) -> str | None:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else None


def _class_name(found: Any) -> str | None:
    """Return the name in one of transformers' tables, which have tuples for some types."""
    return found if isinstance(found, str) or found is None else str(found[0])


def _checked_version(described: str, model_type: object) -> str:
    version, least = transformers_version(), ".".join(map(str, MIN_TRANSFORMERS))
    if version is not None and is_new_enough(version):
        _check_import(described, version)
        return version
    found = "not installed" if version is None else f"here in version {version}"
    native, way = f"no native decoder is for it (native: {', '.join(sorted(FAMILIES))})", ""
    if model_type in FAMILIES:
        native = (
            "implementation=transformers is set or recorded, or its native decoder lacks a setting"
        )
        way = " Or set implementation=native."
    raise DependencyError(
        f"Cannot load this {described}: {native}, and transformers, whose code can run it, is "
        f"{found}. Version {least} or newer is needed. Run: {install_extra('hf')}{way}"
    )


def is_new_enough(version: str) -> bool:
    """Whether transformers of this version can run models here."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= MIN_TRANSFORMERS


def _check_import(described: str, version: str) -> None:
    """Raise DependencyError if the installed transformers refuses to be imported.

    It does where a package that it needs is too old or too new.
    """
    try:
        importlib.import_module("transformers.models.auto.modeling_auto")
    except ImportError as error:
        lines = str(error).strip().splitlines()
        raise DependencyError(
            f"Cannot load this {described}: transformers {version}, whose code runs it, is "
            f"installed, but cannot be imported: {lines[0] if lines else 'it does not say why'}. "
            f"Install it again with what it needs: {install_extra('hf')}"
        ) from None


def _known_type(config: dict[str, Any], described: str, version: str) -> str:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING_NAMES:
        return model_type
    if config.get("auto_map"):
        raise ModelError(
            f"Cannot load this {described}: transformers {version} has no such model, and the code "
            "that its config.json names (auto_map) comes with the weights: it is never run here. "
            "Look for a copy of the model that transformers knows by itself, or a newer "
            f"transformers: {install('-U transformers')}"
        )
    near = did_you_mean(str(model_type), CONFIG_MAPPING_NAMES)
    raise ModelError(
        f"Cannot load this {described}: neither lora nor transformers {version}, which is "
        f"installed, knows it.{near} A newer transformers may: {install('-U transformers')}"
    )


def _is_encoder_decoder(config: dict[str, Any], model_type: str) -> bool:
    from transformers import CONFIG_MAPPING

    given = config.get("is_encoder_decoder")
    return bool(CONFIG_MAPPING[model_type].is_encoder_decoder if given is None else given)


def _other_task(described: str, named: str, causal: str | None) -> str:
    if causal is None:
        return (
            f"Cannot load this {described}: transformers has no causal language model of this "
            f"type. {_KINDS}"
        )
    kinds = (what for end, what in _HEADS.items() if named.endswith(end))
    seen = f"{named} has {next(kinds, 'another head')}"
    return (
        f"Cannot load this {described} as a causal language model: {seen}. Allowed: {causal}. "
        f"{_KINDS}"
    )
