"""The token tables of a model (embedding and output head), and which of their rows train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from lora.decoder.quantised.base import QuantisedWeight
from lora.errors import ConfigError, TargetError, did_you_mean
from lora.layers.trainable_tokens import (
    TrainableTokensEmbedding,
    TrainableTokensLayer,
    TrainableTokensLinear,
)
from lora.lora_module import LoRALayer

_SUMMED_AT_ONCE, _SUMMED_VALUES = 2**25, 2**20
"""Values of tables that are summed as one, and of the fp64 copies of larger ones."""


@runtime_checkable
class HasTokenTables(Protocol):
    """A language model that returns its token tables: transformers' models, our decoders."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the linear that makes logits, or None."""


@dataclass(frozen=True)
class TokenTables:
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


def find_token_tables(model: nn.Module) -> TokenTables:
    """Return the token tables of `model`.

    Raises TargetError for a model that does not name them, and for tables whose rows cannot be
    replaced: quantised ones, embeddings with a forward of their own, heads with a bias.
    """
    if not isinstance(model, HasTokenTables):
        raise TargetError(
            f"Cannot train selected tokens of a {type(model).__name__}: it does not say where its "
            "embedding is (no get_input_embeddings). Train the whole module: modules_to_save."
        )
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for table, plain in ((embedding, nn.Embedding), (head, nn.Linear)):
        allowed = (plain, TrainableTokensEmbedding, TrainableTokensLinear)
        of_lora = table is head and isinstance(table, LoRALayer)
        if isinstance(table, QuantisedWeight):
            raise TargetError(
                f"Cannot train or add tokens in {names.get(id(table))!r}: it is stored in "
                f"{table.kind}, which cannot train. Leave nf4_embeddings out."
            )
        if table is not None and type(table) not in allowed and not of_lora:
            raise TargetError(
                f"Cannot train selected tokens in {names.get(id(table))!r}, a "
                f"{type(table).__name__}. Allowed: a plain {plain.__name__}. Leave it out of "
                "LoRA's targets, or take the native decoder of the model (implementation native), "
                "if it has one."
            )
    if isinstance(head, nn.Linear | LoRALayer) and head.bias is not None:
        raise TargetError(
            f"Cannot train selected tokens in {names.get(id(head))!r}: the output head has a bias. "
            "Train the whole module: modules_to_save."
        )
    return TokenTables(
        names[id(embedding)],
        cast(nn.Embedding, embedding),
        None if head is None else names[id(head)],
        cast(nn.Linear | None, head),
    )


def token_ids_by_table(
    ids: Sequence[int] | Mapping[str, Sequence[int]], tables: TokenTables
) -> dict[str, tuple[int, ...]]:
    """Return the token ids by full name of the table, embedding first; a plain list is for both.

    A tied head gets the embedding's unless it has its own. Raises TargetError for other names, and
    ConfigError for ids that are negative or repeated, or an empty list.
    """
    names = tables.by_name
    by_name = dict(ids) if isinstance(ids, Mapping) else dict.fromkeys(names, ids)
    unknown = [name for name in by_name if name not in names]
    if unknown:
        near = did_you_mean(unknown[0], names)
        raise TargetError(
            f"Cannot train tokens of {unknown[0]!r}: it is no token table. "
            f"Allowed: {', '.join(names)}.{near}"
        )
    if tables.is_tied and tables.embedding_name in by_name:  # as PEFT, a head alone stays alone
        by_name = dict.fromkeys(names, by_name[tables.embedding_name]) | by_name
    for name in by_name:
        if isinstance(names[name], LoRALayer):
            raise TargetError(
                f"Cannot train tokens of {name!r}: it is adapted through LoRA too. Leave it out of "
                "one of the two."
            )
    for name, chosen in by_name.items():
        is_right = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in chosen)
        if not chosen or not is_right or len(set(chosen)) < len(chosen):
            raise ConfigError(
                f"Cannot train the token ids {list(chosen)!r} of {name!r}. Allowed: ids ≥ 0, at "
                "least one, each once."
            )
    return {name: tuple(by_name[name]) for name in names if name in by_name}


def shares_rows(ids: Mapping[str, Sequence[int]], tables: TokenTables) -> bool:
    """Whether `ids`, by table, are the same rows of one weight, so that one tensor trains."""
    return tables.is_tied and len(ids) == 2 and len({tuple(chosen) for chosen in ids.values()}) == 1


def build_trainable_tokens(
    tables: TokenTables, ids: Mapping[str, Sequence[int]], n_known: int, base_rows: int
) -> dict[str, TrainableTokensLayer]:
    """Return, by name, the tables of `ids` wrapped so that these rows train; nothing is replaced.

    A row that the model knows (below `n_known`) starts as it is, a new one at the mean of the known
    rows: the new token is then less likely than the likeliest old ones, and the model's predictions
    hardly change (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").
    """
    layers: dict[str, TrainableTokensLayer] = {}
    for name, chosen in ids.items():
        table = tables.by_name[name]
        weight = cast(Tensor, table.weight)
        if layers and shares_rows(ids, tables):
            rows = next(iter(layers.values())).token_rows
        else:
            rows = nn.Parameter(_initial_rows(weight, chosen, n_known))
        if isinstance(table, nn.Embedding):
            layers[name] = TrainableTokensEmbedding(table, chosen, rows, base_rows)
        else:
            layers[name] = TrainableTokensLinear(cast(nn.Linear, table), chosen, rows, base_rows)
    return layers


def mean_row(weight: Tensor, n_rows: int) -> Tensor:
    """Return the mean (C,) of the first `n_rows` rows, summed in fp64."""
    known = weight.detach()[:n_rows]
    if known.numel() <= _SUMMED_AT_ONCE:
        return known.mean(0, dtype=torch.float64)
    total = torch.zeros(known.shape[1], dtype=torch.float64, device=known.device)
    for part in known.split(max(1, _SUMMED_VALUES // known.shape[1])):
        total += part.sum(0, dtype=torch.float64)
    return total / len(known)


@torch.no_grad()
def _initial_rows(weight: Tensor, ids: Sequence[int], n_known: int) -> Tensor:
    # At least fp32, as A and B: a step of AdamW is often smaller than half a rounding in bf16.
    wide = torch.promote_types(weight.dtype, torch.float32)
    rows = weight.detach()[torch.tensor(ids, device=weight.device)].to(wide)  # (N, C)
    is_new = torch.tensor([number >= n_known for number in ids], device=weight.device)
    if weight.is_meta or not any(number >= n_known for number in ids):
        return rows
    # Rounded as the weight is, so that the base (whose new rows are the mean too) agrees.
    mean = mean_row(weight, n_known).to(weight.dtype).to(wide)
    return torch.where(is_new[:, None], mean, rows)
