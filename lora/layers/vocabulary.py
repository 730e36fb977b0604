"""Growing and shrinking the vocabulary: the number of rows in a model's token tables."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora.decoder.decoder import Decoder
from lora.decoder.language_model import transformers_network
from lora.errors import ModelError, TargetError
from lora.layers.token_tables import TokenTables, find_token_tables, mean_row
from lora.lora_module import LoRALayer

MAX_NEW_ROWS = 2**16
"""Rows by which a vocabulary may grow; a file that asks for more is taken for damaged."""


@torch.no_grad()
def resize_vocabulary(model: nn.Module, vocab_size: int) -> None:
    """Changes `model` in place: its token tables get `vocab_size` rows, and its config says so.

    New rows are the mean of the old ones, for an untied head the mean of its own; when the
    vocabulary shrinks, the last rows go. Old rows keep their bytes, a tied head stays tied.

    Raises ModelError if it would grow by more than MAX_NEW_ROWS, and TargetError as
    `find_token_tables`.
    """
    tables = find_token_tables(model)
    old = tables.embedding.num_embeddings
    if vocab_size - old > MAX_NEW_ROWS:
        raise ModelError(
            f"Cannot grow a vocabulary of {old:,} tokens to {vocab_size:,}: at most "
            f"{MAX_NEW_ROWS:,} are added. Check the token ids."
        )
    if vocab_size == old:
        return
    if isinstance(tables.head, LoRALayer):
        raise TargetError(
            f"Cannot change the vocabulary's size: the head {tables.head_name!r} has LoRA, whose B "
            "has a row for each token. Add the tokens before applying LoRA to it, or leave it out."
        )
    is_tied = tables.is_tied
    means = {name: mean_row(cast(Tensor, t.weight), old) for name, t in tables.by_name.items()}
    network = transformers_network(model)
    if network is not None:
        network.resize_token_embeddings(vocab_size, mean_resizing=False)
    else:
        _resize_tables(tables, vocab_size)
    if isinstance(model, Decoder):
        source = {**model.config.source, "vocab_size": vocab_size}
        model.config = dataclasses.replace(model.config, vocab_size=vocab_size, source=source)
        model.trunk.config = model.config
    for name, table in find_token_tables(model).by_name.items():
        if vocab_size > old and not (is_tied and name == tables.head_name):
            cast(Tensor, table.weight)[old:] = means[name].to(cast(Tensor, table.weight))


def _resize_tables(tables: TokenTables, vocab_size: int) -> None:
    is_tied = tables.is_tied  # read before the first table gets another weight
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
