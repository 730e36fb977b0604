"""Whether an adapter may be loaded onto a base, by the fingerprints and quantisations of both.

A base has up to two fingerprints: of its values before they were quantised, which a folder that is
in 4 bits already does not tell, and of its codes. Those that both sides have are compared. Values
that differ only in how they are quantised are no fault, but a change that is said and measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lora.adapters.bases.linears import lacks_values
from lora.adapters.bases.quantisation import quantisation_of
from lora.adapters.fingerprint import base_fingerprint, code_fingerprint
from lora.adapters.peft_files import read_metadata
from lora.decoder.quantised.record import BaseQuantisation

FINGERPRINT_KEY = "lora_lm_base_fingerprint"
QUANTISATION_KEY = "lora_lm_base_quantisation"
"""In the metadata of an adapter's safetensors file."""


@dataclass(frozen=True)
class TrainedBase:
    """What an adapter's file says of the base that it was trained on."""

    fingerprint: str | None
    """Of the values before they were quantised; None: not known."""
    quantisation: BaseQuantisation | None
    """None: it was not quantised."""

    @property
    def is_4bit_folder(self) -> bool:
        """Whether it was a directory that is in 4 bits itself."""
        return self.quantisation is not None and self.fingerprint is None

    @property
    def is_known(self) -> bool:
        """Whether the file tells anything."""
        return self.fingerprint is not None or self.quantisation is not None


@dataclass(frozen=True)
class BaseCheck:
    """What comparing an adapter's base with the one at hand has found."""

    faults: tuple[str, ...] = ()
    """Why it may not be loaded."""
    warning: str | None = None
    """What could not be compared."""
    is_changed: bool = False
    """Whether this base has other values than the adapter was trained over."""


def read_trained_base(metadata: Mapping[str, str]) -> TrainedBase:
    """Return what an adapter's metadata says. Raises ValueError if it is damaged."""
    text = metadata.get(QUANTISATION_KEY)
    quantisation = None if text is None else BaseQuantisation.from_json(text)
    return TrainedBase(metadata.get(FINGERPRINT_KEY), quantisation)


def trained_base_of(adapter: Path | None) -> TrainedBase:
    """Return what the file of an adapter in a directory says; nothing of a damaged one.

    What is damaged is said where the adapter is loaded.
    """
    try:
        return read_trained_base({} if adapter is None else read_metadata(adapter))
    except ValueError:
        return TrainedBase(None, None)


def base_metadata(model: nn.Module) -> dict[str, str]:
    """Return what an adapter's file says of the base of `model`."""
    fingerprint, kind = base_fingerprint(model), quantisation_of(model)
    if kind is None:
        return {FINGERPRINT_KEY: fingerprint}
    found = {QUANTISATION_KEY: kind.to_json()}
    # Without values from before, the first fingerprint would be that of the codes again.
    return found if fingerprint == kind.fingerprint else {FINGERPRINT_KEY: fingerprint} | found


def check_base(
    trained: TrainedBase, model: nn.Module, called: str, release: Callable[[], None] | None = None
) -> BaseCheck:
    """Return what speaks against loading an adapter onto `model`, whose base it calls `called`."""
    if not trained.is_known:
        return BaseCheck(warning="has no base fingerprint: the base could not be checked")
    kind, fingerprint = quantisation_of(model), base_fingerprint(model, release)
    has_values = kind is None or fingerprint != kind.fingerprint
    wanted = trained.quantisation
    if trained.fingerprint is not None and has_values:
        pair = trained.fingerprint, fingerprint
    elif wanted is not None and kind is None and lacks_values(model):
        warning = (
            f"was trained over a folder in {wanted}; whether this base is the one that it was made "
            "from could not be checked, because its weights come in shards"
        )
        return BaseCheck(warning=warning, is_changed=True)
    elif wanted is not None and (kind is None or kind.has_codes_of(wanted)):
        own = code_fingerprint(model, wanted, release) if kind is None else kind.fingerprint
        pair = wanted.fingerprint, own
        called = f"{called} in {wanted}"
    elif trained.fingerprint is None:
        fault = (
            f"it was trained over {wanted}, without values from before, and this base is in {kind},"
            " whose codes are others: load the base as it is in its files"
        )
        return BaseCheck((fault,))
    else:
        over = "a base that was not quantised" if wanted is None else f"{wanted}"
        warning = (
            f"was trained over {over}, and this base is in {kind}, without values from before: "
            "whether it is the same base could not be checked, nor how far its logits are"
        )
        return BaseCheck(warning=warning)
    if pair[0] != pair[1]:
        fault = (
            f"it was trained on a base{called} with fingerprint {pair[0]}, this one has {pair[1]}"
        )
        return BaseCheck((fault,))
    is_same = kind is wanted if kind is None or wanted is None else kind.has_values_of(wanted)
    return BaseCheck(is_changed=not is_same)
