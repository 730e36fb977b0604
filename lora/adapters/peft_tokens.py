"""Trainable tokens in PEFT's format: the field `trainable_token_indices` and its tensors.

Source of the format: PEFT 0.21, TrainableTokensWrapper. A list of ids means the embedding, an
object maps table names to ids; a tied head with the embedding's ids has no tensor of its own. PEFT
may also write copies of whole resized tables: rows beyond the base's are then taken from these
copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora.adapters.apply import AppliedLoRA, applied_lora
from lora.config import LoRAConfig
from lora.errors import ConfigError, TargetError
from lora.layers.token_tables import (
    TokenTables,
    find_token_tables,
    shares_rows,
    token_ids_by_table,
)
from lora.layers.vocabulary import MAX_NEW_ROWS
from lora.lora_module import LoRALayer

FIELD = "trainable_token_indices"
ENDING = ".token_adapter.trainable_tokens_delta"
TokenIds = dict[str, tuple[int, ...]]
"""The trainable token ids by full name of the table."""


def describe_trainable_tokens(model: nn.Module, applied: AppliedLoRA) -> dict[str, Any]:
    """Return the field of `adapter_config.json` for the trainable tokens; {} if there are none."""
    if not applied.trainable_tokens:
        return {}
    tables, names = find_token_tables(model), [name for name, _ in model.named_modules()]
    by_name = {name: layer.ids for name, layer in applied.trainable_tokens.items()}
    if shares_rows(by_name, tables) or list(by_name) == [tables.embedding_name]:
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
        if tables is None or (expected and shares_rows(ids, tables)):
            continue
        wide = torch.promote_types(weight.dtype, torch.float32)
        shape = len(chosen), weight.shape[1]
        expected[name + ENDING] = torch.empty(shape, dtype=wide, device="meta")
    return expected


@dataclass(frozen=True)
class FileRows:
    """How many rows the token tables have in the base and with an adapter's file."""

    tables: TokenTables | None
    """None: the model does not name its tables, or they cannot grow."""
    base: int = 0
    needed: int = 0

    @property
    def grows(self) -> bool:
        return self.needed > self.base

    def of(self, name: str, rows: int) -> int:
        """Return the rows of the table called `name`, `rows` if it is no table that grows."""
        is_table = self.tables is not None and name in self.tables.by_name
        return self.needed if is_table and self.grows else rows


def rows_in_file(model: nn.Module, ids: TokenIds, tensors: Mapping[str, Tensor]) -> FileRows:
    """Return the rows that `ids` and the whole tables among `tensors` need.

    Names are without PEFT's prefix. A table of another width, or with more new rows than a
    vocabulary may gain, asks for nothing and is then refused for its shape.
    """
    try:
        tables = find_token_tables(model)
    except TargetError:
        return FileRows(None)
    applied = vars(model).get("applied_lora")
    now = tables.embedding.num_embeddings
    grown_from = applied.base_vocab_size if isinstance(applied, AppliedLoRA) else None
    base = now if grown_from is None else grown_from
    rows = [max(chosen) + 1 for chosen in ids.values()]
    for name, table in tables.by_name.items():
        width = cast(Tensor, table.weight).shape[1]
        copies = (tensors.get(key) for key in _copy_names(name))
        rows += [len(c) for c in copies if c is not None and c.dim() == 2 and c.shape[1] == width]
    return FileRows(tables, base, max([base, *(n for n in rows if n <= base + MAX_NEW_ROWS)]))


def _copy_names(table: str) -> tuple[str, ...]:
    return tuple(
        f"{table}{layer}.weight" for layer in (".token_adapter.base_layer", ".base_layer", "")
    )


def split_copies(
    rows: FileRows, saved: Sequence[str], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return `tensors` without PEFT's copies of whole tables, and the new rows of these copies.

    Names are without PEFT's prefix. A copy is cut to the base's rows; those beyond are returned by
    name of the table. Tables in `saved` train fully and are no copies. The trained rows of a tied
    head are dropped if they equal the embedding's.
    """
    tables, kept = rows.tables, dict(tensors)
    fills: dict[str, Tensor] = {}
    if tables is None:
        return kept, fills
    for name, table in tables.by_name.items():
        width = cast(Tensor, table.weight).shape[1]
        for key in _copy_names(name):
            copy = tensors.get(key)
            if copy is None or copy.dim() != 2 or copy.shape[1] != width:
                continue
            if name not in saved:
                del kept[key]
                kept[f"{name}.weight"], fills[name] = copy[: rows.base], copy[rows.base :]
            elif key != f"{name}.weight":
                kept[key] = copy[: rows.base]
    first, second = (f"{name}{ENDING}" for name in (tables.embedding_name, tables.head_name))
    if tables.is_tied and first in kept and second in kept and _equal(kept[first], kept[second]):
        del kept[second]
    return kept, fills


@torch.no_grad()
def fill_new_rows(model: nn.Module, fills: Mapping[str, Tensor], base_rows: int) -> None:
    """Changes `model` in place: rows beyond the base's get the values from the file.

    Tables that get other values than the mean are noted, so that saving writes them again.
    """
    applied = applied_lora(model)
    for name, values in fills.items():
        weight = cast(Tensor, model.get_submodule(name).weight)[base_rows:]
        n_rows = min(len(values), len(weight))
        given = values[:n_rows].to(weight)
        if not torch.equal(weight[:n_rows], given):
            weight[:n_rows] = given
            if name not in applied.filled_tables:
                applied.filled_tables = (*applied.filled_tables, name)


def table_copies(model: nn.Module, applied: AppliedLoRA) -> dict[str, Tensor]:
    """Return, by PEFT's names without its prefix, the tables whose added rows a file gave."""
    copies: dict[str, Tensor] = {}
    for name in applied.filled_tables:
        table = model.get_submodule(name)
        weight = cast(Tensor, table.weight)
        if any(weight is other for other in copies.values()):
            continue  # a tied head
        of_tokens, of_lora, plain = _copy_names(name)
        is_adapted = isinstance(table, LoRALayer)
        key = of_tokens if name in applied.trainable_tokens else of_lora if is_adapted else plain
        copies[key] = weight
    return copies


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
