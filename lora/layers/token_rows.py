"""Single rows of the token tables that train while the rest of them is frozen.

The tables are the embedding and the output head. What differs from a copy of the whole table: the
frozen weight keeps its name and its bytes, the trained rows stand beside it as (N, C) and take the
place of its rows in the product, so neither a gradient nor a moment of (V, C) exists. A tied head
shares the embedding's rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.decoder.decoder import Decoder
from lora.errors import ConfigError, ModelError, TargetError, did_you_mean

MAX_NEW_ROWS = 2**16
"""Rows by which a vocabulary may grow: more are a damaged file's."""


@runtime_checkable
class HasTables(Protocol):
    """A language model that knows its token tables: transformers' models, our decoders."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the linear that makes logits, or None."""


@runtime_checkable
class Resizable(Protocol):
    """A model that changes the size of its own tables: transformers' models."""

    def resize_token_embeddings(self, new_num_tokens: int, *, mean_resizing: bool) -> nn.Module:
        """Change the tables in place."""


class RowsEmbedding(nn.Embedding):
    """An embedding with frozen `weight` (V, C) whose rows `ids` are `token_rows` (N, C)."""

    def __init__(
        self, base: nn.Embedding, ids: Sequence[int], token_rows: nn.Parameter, base_rows: int
    ) -> None:
        with torch.device("meta"):  # no storage: the weight is replaced at once
            super().__init__(base.num_embeddings, base.embedding_dim, base.padding_idx)
        self.weight = base.weight.requires_grad_(False)
        self.token_rows, self.ids, self.base_rows = token_rows, tuple(ids), base_rows
        places = torch.full((base.num_embeddings,), -1, device=base.weight.device)
        places[torch.tensor(self.ids, device=places.device)] = torch.arange(
            len(self.ids), device=places.device
        )
        self.places: Tensor
        self.register_buffer("places", places, persistent=False)
        self.train(base.training)

    def forward(self, input: Tensor) -> Tensor:  # (B, T) -> (B, T, C)
        frozen = F.embedding(input, self.weight, self.padding_idx)  # (B, T, C)
        place = F.embedding(input, self.places[:, None]).squeeze(-1)  # (B, T), -1: frozen
        trained = F.embedding(place.clamp(min=0), self.token_rows).to(frozen.dtype)  # (B, T, C)
        return torch.where(place[..., None] >= 0, trained, frozen)

    def merge(self) -> nn.Module:
        """Return a plain embedding with the rows written into a new weight."""
        return plain_embedding(_written(self), self)

    def unwrap(self) -> nn.Module:
        """Return the plain embedding with the frozen weight."""
        return plain_embedding(self.weight, self)


class RowsLinear(nn.Linear):
    """A head without bias, frozen `weight` (V, C), whose rows `ids` are `token_rows` (N, C)."""

    def __init__(
        self, base: nn.Linear, ids: Sequence[int], token_rows: nn.Parameter, base_rows: int
    ) -> None:
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight.requires_grad_(False)
        self.token_rows, self.ids, self.base_rows = token_rows, tuple(ids), base_rows
        columns = torch.tensor(self.ids, device=base.weight.device)
        self.columns: Tensor
        self.register_buffer("columns", columns, persistent=False)
        self.train(base.training)

    def forward(self, input: Tensor) -> Tensor:  # (..., C) -> (..., V)
        frozen = F.linear(input, self.weight)  # (..., V)
        trained = F.linear(input.to(self.token_rows.dtype), self.token_rows)  # (..., N)
        return frozen.index_copy(-1, self.columns, trained.to(frozen.dtype))

    def merge(self) -> nn.Module:
        """Return a plain linear with the rows written into a new weight."""
        return plain_linear(_written(self), self)

    def unwrap(self) -> nn.Module:
        """Return the plain linear with the frozen weight."""
        return plain_linear(self.weight, self)


RowsLayer = RowsEmbedding | RowsLinear


@dataclass(frozen=True)
class Tables:
    """The token tables of a model, by their full names."""

    embedding_name: str
    embedding: nn.Embedding
    head_name: str | None
    """None: the model has no head of its own."""
    head: nn.Linear | None

    @property
    def is_tied(self) -> bool:
        """Whether head and embedding share one weight."""
        return self.head is not None and self.head.weight is self.embedding.weight

    @property
    def by_name(self) -> dict[str, nn.Module]:
        """Embedding and head."""
        tables: dict[str, nn.Module] = {self.embedding_name: self.embedding}
        if self.head_name is not None and self.head is not None:
            tables[self.head_name] = self.head
        return tables


def find_tables(model: nn.Module) -> Tables:
    """Return the token tables of `model`.

    Raises TargetError for a model that does not name them, and for tables whose rows cannot be
    replaced: adapted or quantised ones, embeddings that scale by themselves, heads with a bias.
    """
    if not isinstance(model, HasTables):
        raise TargetError(
            f"Rows of tokens were to train in a {type(model).__name__}, which does not say where "
            "its embedding is (get_input_embeddings). Train the module whole: modules_to_save."
        )
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for table, plain in ((embedding, nn.Embedding), (head, nn.Linear)):
        if table is not None and type(table) not in (plain, RowsEmbedding, RowsLinear):
            raise TargetError(
                f"Rows of tokens were to train in {names.get(id(table))!r}, a "
                f"{type(table).__name__}: allowed is a plain {plain.__name__}. Leave it out of "
                "LoRA's targets, or load the model as lora's Decoder."
            )
    if isinstance(head, nn.Linear) and head.bias is not None:
        raise TargetError("Rows of tokens were to train, and the output head has a bias.")
    return Tables(
        names[id(embedding)],
        cast(nn.Embedding, embedding),
        None if head is None else names[id(head)],
        cast(nn.Linear | None, head),
    )


def rows_by_table(
    ids: Sequence[int] | Mapping[str, Sequence[int]], tables: Tables
) -> dict[str, tuple[int, ...]]:
    """Return the ids by full name of the table, embedding first; a plain list is for both.

    A tied head always goes with the embedding. Raises TargetError for other names, and ConfigError
    for ids that are no rows or stand twice.
    """
    names = tables.by_name
    by_name = dict(ids) if isinstance(ids, Mapping) else dict.fromkeys(names, ids)
    unknown = [name for name in by_name if name not in names]
    if unknown:
        near = did_you_mean(unknown[0], names)
        raise TargetError(
            f"Rows of {unknown[0]!r} were to train: allowed are {', '.join(names)}.{near}"
        )
    if tables.is_tied:
        if len({tuple(chosen) for chosen in by_name.values()}) > 1:
            raise TargetError("Embedding and head share one weight: their rows must be the same.")
        by_name = dict.fromkeys(names, next(iter(by_name.values()), ()))
    for name, chosen in by_name.items():
        is_right = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in chosen)
        if not chosen or not is_right or len(set(chosen)) < len(chosen):
            raise ConfigError(
                f"Rows {chosen!r} of {name!r} were to train: allowed are ids ≥ 0, at least one, "
                "each once."
            )
    return {name: tuple(by_name[name]) for name in names if name in by_name}


def build_rows_layers(
    tables: Tables, ids: Mapping[str, Sequence[int]], n_known: int, base_rows: int
) -> dict[str, RowsLayer]:
    """Return, by name, the tables of `ids` wrapped so that these rows train; nothing is replaced.

    A row that the model knows (below `n_known`) starts as it is, a new one at the mean of those
    known: the new token is then less likely than the likeliest old ones, and what the model says
    hardly changes (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").
    """
    layers: dict[str, RowsLayer] = {}
    for name, chosen in ids.items():
        table = tables.by_name[name]
        weight = cast(Tensor, table.weight)
        if tables.is_tied and layers:
            rows = next(iter(layers.values())).token_rows
        else:
            rows = nn.Parameter(_first_rows(weight, chosen, n_known))
        if isinstance(table, nn.Embedding):
            layers[name] = RowsEmbedding(table, chosen, rows, base_rows)
        else:
            layers[name] = RowsLinear(cast(nn.Linear, table), chosen, rows, base_rows)
    return layers


@torch.no_grad()
def resize_vocabulary(model: nn.Module, vocab_size: int) -> None:
    """Changes `model` in place: its tables get `vocab_size` rows, its config says so.

    New rows are the mean of the old ones, for a head that is not tied of its own; with fewer rows
    the last ones go. Old rows keep their bytes, a tied head stays tied.

    Raises ModelError if it would grow by more than MAX_NEW_ROWS, and TargetError as `find_tables`.
    """
    tables = find_tables(model)
    old = tables.embedding.num_embeddings
    if vocab_size - old > MAX_NEW_ROWS:
        raise ModelError(
            f"{vocab_size:,} tokens were asked of a model with {old:,}: at most {MAX_NEW_ROWS:,} "
            "are added. Check the token ids."
        )
    if vocab_size == old:
        return
    is_tied = tables.is_tied
    means = {name: mean_row(cast(Tensor, t.weight), old) for name, t in tables.by_name.items()}
    if isinstance(model, Resizable):
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    else:
        _resize_plain(tables, vocab_size)
    if isinstance(model, Decoder):
        source = {**model.config.source, "vocab_size": vocab_size}
        model.config = dataclasses.replace(model.config, vocab_size=vocab_size, source=source)
        model.trunk.config = model.config
    for name, table in find_tables(model).by_name.items():
        if vocab_size > old and not (is_tied and name == tables.head_name):
            cast(Tensor, table.weight)[old:] = means[name].to(cast(Tensor, table.weight))


def mean_row(weight: Tensor, n_rows: int) -> Tensor:
    """Return the mean (C,) of the first `n_rows` rows, summed in fp64."""
    return weight.detach()[:n_rows].mean(0, dtype=torch.float64)


def plain_embedding(weight: Tensor, like: nn.Embedding) -> nn.Embedding:
    """Return an nn.Embedding with `weight` itself (V, C), otherwise as `like`."""
    with torch.device("meta"):
        plain = nn.Embedding(len(weight), like.embedding_dim, like.padding_idx)
    plain.weight = _frozen(weight)
    return plain.train(like.training)


def plain_linear(weight: Tensor, like: nn.Linear) -> nn.Linear:
    """Return an nn.Linear without bias with `weight` itself (V, C), otherwise as `like`."""
    with torch.device("meta"):
        plain = nn.Linear(like.in_features, len(weight), bias=False)
    plain.weight = _frozen(weight)
    return plain.train(like.training)


def _frozen(weight: Tensor) -> nn.Parameter:
    return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)


@torch.no_grad()
def _written(layer: RowsLayer) -> Tensor:
    ids = torch.tensor(layer.ids, device=layer.weight.device)
    return layer.weight.index_copy(0, ids, layer.token_rows.to(layer.weight.dtype))  # (V, C)


@torch.no_grad()
def _first_rows(weight: Tensor, ids: Sequence[int], n_known: int) -> Tensor:
    # At least fp32, as A and B: a step of AdamW is often smaller than half a rounding in bf16.
    wide = torch.promote_types(weight.dtype, torch.float32)
    rows = weight.detach()[torch.tensor(ids, device=weight.device)].to(wide)  # (N, C)
    is_new = torch.tensor([number >= n_known for number in ids], device=weight.device)
    if weight.is_meta or not any(number >= n_known for number in ids):
        return rows
    # Rounded as the weight is, so that the base (whose new rows are the mean too) agrees.
    mean = mean_row(weight, n_known).to(weight.dtype).to(wide)
    return torch.where(is_new[:, None], mean, rows)


def _resize_plain(tables: Tables, vocab_size: int) -> None:
    is_tied = tables.is_tied  # asked before the first table has another weight
    for table in tables.by_name.values():
        weight = cast(nn.Parameter, table.weight)
        if is_tied and table is tables.head:
            table.weight = tables.embedding.weight
        elif vocab_size < len(weight):
            kept = weight.detach()[:vocab_size]  # a view: the bytes stay where they are
            table.weight = nn.Parameter(kept, requires_grad=weight.requires_grad)
        else:
            grown = weight.new_empty(vocab_size, weight.shape[1])
            grown[: len(weight)] = weight
            table.weight = nn.Parameter(grown, requires_grad=weight.requires_grad)
        if isinstance(table, nn.Embedding):
            table.num_embeddings = vocab_size
        else:
            cast(Any, table).out_features = vocab_size
