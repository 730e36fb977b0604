"""Into which values of a base an adapter is merged: those trained over, or others on request."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lora.adapters.bases.linears import default_kind
from lora.adapters.bases.rules import trained_base_of
from lora.config import BaseDtype
from lora.decoder.quantised.record import BaseQuantisation
from lora.pretrained.quantised.folder import check_answer_dtype, is_folder_in_4bit


@dataclass(frozen=True)
class MergedValues:
    """How the weights of a plain base are rounded before they are merged."""

    rounded_as: BaseQuantisation | None = None
    """None: as they are in the files, packed or plain."""
    are_others: bool = False
    """Whether the adapter is known to have been trained over other values."""
    trained_as: BaseQuantisation | None = None
    """How these were rounded, if they were."""


AS_STORED = MergedValues()
"""As in the files, which is what the adapter was trained over, or nothing tells."""


def choose_values(asked: BaseDtype, adapter: Path | None, folder: Path) -> MergedValues:
    """Return the values of the base in `folder` that an adapter is merged into, in a directory.

    Without an adapter, those of the files, or rounded as asked. Raises ConfigError for a word that
    is not allowed, or that a folder in 4 bits cannot follow.
    """
    check_answer_dtype(asked)
    if is_folder_in_4bit(folder, asked):
        return AS_STORED
    trained = trained_base_of(adapter)
    kind = trained.quantisation
    if asked == "auto" or (kind is not None and asked == kind.dtype):
        return MergedValues(kind)
    wanted = None
    if asked != "original":  # as other tools train over it: in bf16
        wanted = replace(default_kind(asked), compute_dtype="bfloat16")
    are_others = trained.is_known and not (wanted is None and kind is None)
    return MergedValues(wanted, are_others, kind)
