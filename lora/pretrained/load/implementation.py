"""Which code runs a model: a native decoder, or transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lora.config import ImplementationName
from lora.decoder.families import FAMILIES, decoder_config
from lora.errors import (
    DependencyError,
    ModelError,
    UnsupportedModelError,
)
from lora.pretrained.load.architectures import (
    Architecture,
    describe_architecture,
    find_architecture,
    transformers_version,
)
from lora.pretrained.quantised.methods import is_4bit, settings_of
from lora.settings.checks import refuse_other_words

Kind = Literal["native", "transformers"]


@dataclass(frozen=True)
class Implementation:
    """The code that runs a model, and why it was chosen."""

    kind: Kind
    reason: str
    architecture: Architecture | None = None
    """The class of transformers; None for a native decoder."""

    def describe(self) -> str:
        """Return one line for the user."""
        name = "native decoder" if self.kind == "native" else f"transformers {self._version}"
        part = ""
        if self.architecture is not None and self.architecture.is_multimodal:
            part = "; of this multimodal model the text part is used, its other towers are not"
        return f"implementation: {name} ({self.reason}{part})"

    def tell_unless_native(self, on_message: Callable[[str], None]) -> None:
        """Call `on_message` with the line, if it is not the usual native decoder."""
        if self.kind != "native":
            on_message(self.describe())

    @property
    def _version(self) -> str:
        return transformers_version() or ""


def choose_implementation(
    config: dict[str, Any], asked: ImplementationName = "auto"
) -> Implementation:
    """Return the code that runs the model of a config.json: the one asked for, or of auto the best.

    auto is a native decoder where there is one that reads this config.json, else transformers.
    Raises ConfigError for another word, UnsupportedModelError for native where there is no native
    decoder, ModelError by name for weights that are quantised otherwise than in bitsandbytes' nf4,
    and what `find_architecture` raises for transformers.
    """
    refuse_other_words("implementation", asked, ImplementationName)
    is_4bit(config, describe_architecture(config))  # another method is refused by its name
    if asked == "transformers":
        return Implementation("transformers", "as asked", find_architecture(config))
    try:
        family = decoder_config(config).family
    except UnsupportedModelError as error:
        if asked == "native":
            raise UnsupportedModelError(_no_native(config, error)) from None
        return _by_transformers(config, error)
    return Implementation("native", "as asked" if asked == "native" else f"it runs {family!r}")


def _by_transformers(config: dict[str, Any], error: UnsupportedModelError) -> Implementation:
    if config.get("model_type") not in FAMILIES:
        reason = f"no native decoder for {config.get('model_type')!r}"
        return Implementation("transformers", reason, find_architecture(config))
    faults = [line[4:] for line in str(error).splitlines() if line.startswith("  - ")]
    reason = f"the native decoder of {config['model_type']!r} does not have {'; '.join(faults[:1])}"
    try:
        return Implementation("transformers", reason, find_architecture(config))
    except (ModelError, DependencyError) as other:
        if faults and settings_of(config) is None:
            raise UnsupportedModelError(f"{error}\n{other}") from None  # ours lists all fields
        raise


def _no_native(config: dict[str, Any], error: UnsupportedModelError) -> str:
    if config.get("model_type") in FAMILIES:
        return str(error)
    return (
        f"Cannot load this {describe_architecture(config)} with implementation=native: there is "
        f"no native decoder for it. Native here: {', '.join(sorted(FAMILIES))}. Leave the setting "
        "out, or take transformers."
    )
