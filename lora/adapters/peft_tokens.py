"""Trainable tokens in PEFT's format: the field `trainable_token_indices` and its tensors.

Source of the format: PEFT 0.21, TrainableTokensWrapper. A list of ids means the embedding, an
object maps table names to ids; a head tied to the embedding has no tensor of its own. PEFT may also
write copies of whole resized tables: rows beyond the base's are then taken from these copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora.adapters.apply import AppliedLoRA
from lora.config import LoRAConfig
from lora.errors import ConfigError, TargetError
from lora.layers.token_tables import TokenTables, find_token_tables, token_ids_by_table
from lora.layers.trainable_tokens import TrainableTokensEmbedding
from lora.layers.vocabulary import MAX_NEW_ROWS

FIELD = "trainable_token_indices"
ENDING = ".token_adapter.trainable_tokens_delta"
TokenIds = dict[str, tuple[int, ...]]
"""The trainable token ids by full name of the table."""


def describe_trainable_tokens(model: nn.Module, applied: AppliedLoRA) -> dict[str, Any]:
    """Return the field of `adapter_config.json` for the trainable tokens; {} if there are none."""
    if not applied.trainable_tokens:
        return {}
    tables, names = find_token_tables(model), [name for name, _ in model.named_modules()]
    if tables.is_tied or list(applied.trainable_tokens) == [tables.embedding_name]:
        return {FIELD: list(next(iter(applied.trainable_tokens.values())).ids)}
    described = {}
    for name, layer in applied.trainable_tokens.items():
        ending = name.rpartition(".")[2]
        # PEFT matches by `endswith`, without a dot before it.
        is_clear = sum(other.endswith(ending) for other in names) == 1
        described[ending if is_clear else name] = list(layer.ids)
    return {FIELD: described}


def find_trainable_tokens(
    model: nn.Module, value: Any, config: LoRAConfig
) -> tuple[TokenIds, list[str]]:
    """Return the token ids that the field's `value` means for `model`, and all faults."""
    if not value:
        return {}, []
    try:
        tables = find_token_tables(model)
        ids = token_ids_by_table(_by_full_name(value, tables), tables)
    except (TargetError, ConfigError) as error:
        return {}, [f"{FIELD}: {error}"]
    faults = [
        f"{FIELD}: {name!r} is also a target or in modules_to_save"
        for name in ids
        if name in config.targets or name in config.modules_to_save
    ]
    largest = max(max(chosen) for chosen in ids.values())
    limit = tables.embedding.num_embeddings + MAX_NEW_ROWS
    if largest >= limit:
        faults.append(f"{FIELD}: token id {largest:,}, allowed are ids below {limit:,} here")
    return ids, faults


def trainable_token_tensors(applied: AppliedLoRA) -> dict[str, Tensor]:
    """Return the trained rows by tensor name, without PEFT's prefix."""
    tensors: dict[str, Tensor] = {}
    for name, layer in applied.trainable_tokens.items():
        if not any(layer.token_rows is tensor for tensor in tensors.values()):
            tensors[name + ENDING] = layer.token_rows
    return tensors


def expected_token_tensors(model: nn.Module, ids: TokenIds) -> dict[str, Tensor]:
    """Return, on the meta device, what `trainable_token_tensors` will return."""
    expected: dict[str, Tensor] = {}
    tables = find_token_tables(model) if ids else None
    for name, chosen in ids.items():
        weight = cast(Tensor, model.get_submodule(name).weight)
        if tables is None or (tables.is_tied and expected):
            continue
        wide = torch.promote_types(weight.dtype, torch.float32)
        shape = len(chosen), weight.shape[1]
        expected[name + ENDING] = torch.empty(shape, dtype=wide, device="meta")
    return expected


def split_copies(
    model: nn.Module, ids: TokenIds, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return `tensors` without PEFT's copies of whole tables, and the new rows of these copies.

    Names are without PEFT's prefix. A copy is cut to the base's rows; those beyond are returned by
    name of the table. The trained rows of a tied head are dropped if they equal the embedding's.
    """
    if not ids:
        return dict(tensors), {}
    tables, kept, fills = find_token_tables(model), dict(tensors), {}
    base_rows = _base_rows(tables)
    for name, table in tables.by_name.items():
        width = cast(Tensor, table.weight).shape[1]
        for key in (f"{name}.token_adapter.base_layer.weight", f"{name}.weight"):
            copy = kept.get(key)
            if copy is not None and copy.dim() == 2 and copy.shape[1] == width:
                del kept[key]
                kept[f"{name}.weight"], fills[name] = copy[:base_rows], copy[base_rows:]
    first, second = (f"{name}{ENDING}" for name in (tables.embedding_name, tables.head_name))
    if tables.is_tied and first in kept and second in kept and _equal(kept[first], kept[second]):
        del kept[second]
    return kept, fills


@torch.no_grad()
def fill_new_rows(model: nn.Module, fills: Mapping[str, Tensor]) -> None:
    """Changes `model` in place: rows beyond the base's get the values from the file."""
    for name, values in fills.items():
        layer = model.get_submodule(name)
        weight, start = cast(Tensor, layer.weight), _base_rows(find_token_tables(model))
        n_rows = min(len(values), len(weight) - start)
        weight[start : start + n_rows] = values[:n_rows].to(weight)


def _base_rows(tables: TokenTables) -> int:
    embedding = tables.embedding
    if isinstance(embedding, TrainableTokensEmbedding):
        return embedding.base_rows
    return embedding.num_embeddings


def _by_full_name(value: Any, tables: TokenTables) -> TokenIds:
    if not isinstance(value, dict):
        return {tables.embedding_name: tuple(value)}
    by_name: TokenIds = {}
    for ending, ids in value.items():
        found = [name for name in tables.by_name if name.endswith(ending)]
        by_name |= dict.fromkeys(found or [ending], tuple(ids))
    return by_name


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
