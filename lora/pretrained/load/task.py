"""What a job leaves open about its model: which code runs it, and whether examples are packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from lora.config import BaseWeights, DataConfig, ImplementationName
from lora.data.prepare import PreparedData
from lora.data.task import Task
from lora.decoder.config import DecoderConfig
from lora.decoder.families import FAMILIES
from lora.decoder.language_model import ModelConfig
from lora.errors import ConfigError
from lora.pretrained.load.models import (
    empty_language_model,
    implementation_of,
    model_config,
    quantise_empty_model,
    why_not_packed,
)
from lora.pretrained.positions import check_positions
from lora.pretrained.quantised.folder import FolderIn4Bit, find_4bit
from lora.pretrained.transformers_models.config import TransformersConfig
from lora.pretrained.transformers_models.quantiser import why_not_quantised

TaskT = TypeVar("TaskT", bound=Task)


def settled_task(
    task: TaskT,
    folder: Path,
    recorded: ImplementationName | None,
    on_message: Callable[[str], None],
    compute_dtype: torch.dtype = torch.float32,
) -> TaskT:
    """Return a job on the model in `folder` with its implementation, and packing on or off.

    `recorded` is the implementation of the run or the adapter that is continued. A message has
    what was chosen, and why.
    Raises ModelError, DependencyError or ConfigError for a model that cannot be run as asked.
    """
    asked = task.implementation if task.implementation != "auto" else recorded or "auto"
    # The command line passes a resumed run its recorded settings as flags.
    is_recorded = asked != "auto" and asked == recorded
    chosen = implementation_of(folder, asked, is_recorded=is_recorded)
    on_message(chosen.describe())
    config = model_config(folder, chosen.kind)
    data = settled_packing(task.data_config, config, on_message, compute_dtype)
    return replace(task, implementation=chosen.kind, data_config=data)


def settled_packing(
    data: DataConfig,
    config: ModelConfig,
    on_message: Callable[[str], None] = lambda message: None,
    compute_dtype: torch.dtype = torch.float32,
) -> DataConfig:
    """Return the settings with packing on or off; where nobody asked, as the architecture allows.

    Raises ConfigError for packing=True where the architecture has none.
    """
    reason = why_not_packed(config, compute_dtype)
    if reason is None or data.packing is False:
        return replace(data, packing=data.is_packed)
    if data.packing:
        raise ConfigError(
            f"Cannot pack the examples of this {config.family!r} model: {reason}. Leave packing "
            "out: each example then has a sequence of its own."
        )
    on_message(f"packing is off for this {config.family!r} model: {reason}")
    return replace(data, packing=False)


def check_lengths(config: ModelConfig, data: PreparedData) -> None:
    """Raise ConfigError if sequences outgrow the table of positions; no weights are read."""
    n_tokens = data.longest_sequence_tokens
    if n_tokens > config.max_position_embeddings:
        check_positions(empty_language_model(config), n_tokens)


def settled_base(
    folder: Path,
    asked: BaseWeights,
    on_message: Callable[[str], None] = lambda message: None,
    *,
    is_full: bool = False,
) -> BaseWeights:
    """Return how the base in `folder` is stored: as asked, or as a folder in 4 bits is already.

    A message has what the folder is. Raises ModelError for weights that are quantised otherwise or
    damaged, ConfigError for settings that a folder in 4 bits does not have, and for training all
    of its weights (`is_full`).
    """
    found = find_4bit(folder)
    settled = _settled(found, asked, is_full=is_full)
    if found is not None:
        on_message(found.describe())
    return settled


def _settled(
    found: FolderIn4Bit | None, asked: BaseWeights, *, is_full: bool = False
) -> BaseWeights:
    if found is None:
        return asked if asked.is_quantised else BaseWeights()
    if is_full:
        raise ConfigError(
            f"Cannot train all weights of {found.folder}: it is in 4 bits already (bitsandbytes), "
            "and updates would be rounded away. Train with LoRA, or name the unquantised model."
        )
    return found.settled(asked)


def planned_base(folder: Path, asked: BaseWeights) -> tuple[BaseWeights, frozenset[str] | None]:
    """Return how the base in `folder` would be stored, and the names of the weights that are so.

    None: all of the blocks' linears. config.json is enough. Raises as `settled_base` does.
    """
    found = find_4bit(folder, needs_weights=False)
    only = None if found is None else found.packed or None
    return _settled(found, asked), only


def check_base(
    folder: Path,
    implementation: ImplementationName,
    asked: BaseWeights,
    *,
    is_full: bool = False,
    fsdp: bool = False,
) -> None:
    """Raise for a base in `folder` that cannot be stored as asked; no weights are read.

    Also ConfigError for what only native decoders have, and ModelError for linears that `asked`
    cannot hold.
    """
    found = find_4bit(folder)
    base = _settled(found, asked, is_full=is_full)
    config = model_config(folder, implementation)
    check_native_only(config, base=base, fsdp=fsdp)
    if isinstance(config, DecoderConfig):
        only = None if found is None else found.packed
        quantise_empty_model(empty_language_model(config), base, only)


def check_native_only(config: ModelConfig, *, base: BaseWeights, fsdp: bool) -> None:
    """Raise ConfigError for settings that only native decoders have.

    Also for a quantised base of an architecture whose code does not take one.
    """
    if isinstance(config, TransformersConfig) and base.is_quantised:
        why = why_not_quantised(config.theirs, base)
        if why is not None:
            raise ConfigError(
                f"Cannot use base_dtype={base.base_dtype!r} with this {config.family!r} model: "
                f"{why}. Leave base_dtype out."
            )
    if base.nf4_embeddings and fsdp:
        raise ConfigError(
            "Cannot use nf4_embeddings with parallel='fsdp': of a sharded model the embedding and "
            "the head are in the compute dtype. Leave nf4_embeddings out, or take parallel='ddp'."
        )
    given = {
        "nf4_embeddings": (base.nf4_embeddings, "the embedding and the head are as they were"),
        "parallel='fsdp'": (fsdp, "each process has all weights, as with parallel='ddp'"),
    }
    wrong = {name: why for name, (is_given, why) in given.items() if is_given}
    if isinstance(config, DecoderConfig) or not wrong:
        return
    way = "Take implementation=native, or leave it out." if config.family in FAMILIES else ""
    raise ConfigError(
        f"Cannot use {' and '.join(wrong)} with this {config.family!r} model: transformers runs "
        f"it, where {' and '.join(wrong.values())}. Only native decoders have that "
        f"({', '.join(sorted(FAMILIES))}). {way or 'Leave it out.'}"
    )
