"""Trained rows of tokens in PEFT's format: `trainable_token_indices` and its tensors.

Source of the format: PEFT 0.21, TrainableTokensWrapper. A list of ids means the embedding, an
object says which table; a head tied to the embedding has no tensor of its own. Beside the rows PEFT
may write copies of whole resized tables, whose other new rows then are the model's.
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
from lora.layers.vocabulary import MAX_NEW_ROWS

FIELD = "trainable_token_indices"
ENDING = ".token_adapter.trainable_tokens_delta"
Rows = dict[str, tuple[int, ...]]
"""Ids by full name of the table."""


def describe_rows(model: nn.Module, applied: AppliedLoRA) -> dict[str, Any]:
    """Return the field of `adapter_config.json` for the rows that train; nothing if none do."""
    if not applied.trainable_tokens:
        return {}
    tables, names = find_token_tables(model), [name for name, _ in model.named_modules()]
    if tables.is_tied or list(applied.trainable_tokens) == [tables.embedding_name]:
        return {FIELD: list(next(iter(applied.trainable_tokens.values())).ids)}
    described = {}
    for name, layer in applied.trainable_tokens.items():
        ending = name.rpartition(".")[2]
        is_clear = sum(other.endswith(ending) for other in names) == 1
        described[ending if is_clear else name] = list(layer.ids)
    return {FIELD: described}


def find_rows(model: nn.Module, value: Any, config: LoRAConfig) -> tuple[Rows, list[str]]:
    """Return the rows that the field's `value` means for `model`, and what is wrong with it."""
    if not value:
        return {}, []
    try:
        tables = find_token_tables(model)
        rows = token_ids_by_table(_by_full_name(value, tables), tables)
    except (TargetError, ConfigError) as error:
        return {}, [f"{FIELD}: {error}"]
    faults = [
        f"{FIELD}: {name!r} trains otherwise in the same file"
        for name in rows
        if name in config.targets or name in config.modules_to_save
    ]
    largest = max(max(chosen) for chosen in rows.values())
    most = tables.embedding.num_embeddings + MAX_NEW_ROWS
    if largest >= most:
        faults.append(f"{FIELD}: row {largest:,}, and this base can have {most:,} at most")
    return rows, faults


def row_tensors(applied: AppliedLoRA) -> dict[str, Tensor]:
    """Return the trained rows by the name of their tensor, without PEFT's prefix."""
    tensors: dict[str, Tensor] = {}
    for name, layer in applied.trainable_tokens.items():
        if not any(layer.token_rows is tensor for tensor in tensors.values()):
            tensors[name + ENDING] = layer.token_rows
    return tensors


def expected_rows(model: nn.Module, rows: Rows) -> dict[str, Tensor]:
    """Return, on the meta device, what `row_tensors` will return."""
    expected: dict[str, Tensor] = {}
    tables = find_token_tables(model) if rows else None
    for name, ids in rows.items():
        weight = cast(Tensor, model.get_submodule(name).weight)
        if tables is None or (tables.is_tied and expected):
            continue
        wide = torch.promote_types(weight.dtype, torch.float32)
        shape = len(ids), weight.shape[1]
        expected[name + ENDING] = torch.empty(shape, dtype=wide, device="meta")
    return expected


def split_copies(
    model: nn.Module, rows: Rows, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return `tensors` (without PEFT's prefix) without what PEFT writes twice, and new rows.

    New rows are those of copies of whole tables, beyond the base's own, by name of the table; what
    remains of such a copy are the base's rows. The rows of a tied head are the embedding's.
    """
    if not rows:
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
    """Changes `model` in place: rows beyond the base's take the values that the file has."""
    for name, values in fills.items():
        layer = model.get_submodule(name)
        weight, start = cast(Tensor, layer.weight), _base_rows(find_token_tables(model))
        n_rows = min(len(values), len(weight) - start)
        weight[start : start + n_rows] = values[:n_rows].to(weight)


def _base_rows(tables: TokenTables) -> int:
    own = vars(tables.embedding).get("base_rows")
    return tables.embedding.num_embeddings if own is None else int(own)


def _by_full_name(value: Any, tables: TokenTables) -> Rows:
    if not isinstance(value, dict):
        return {tables.embedding_name: tuple(value)}
    rows: Rows = {}
    for ending, ids in value.items():
        found = [name for name in tables.by_name if name.endswith(ending)]
        rows |= dict.fromkeys(found or [ending], tuple(ids))
    return rows


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
