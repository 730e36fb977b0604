"""Special tokens added to a model's vocabulary: which rows they get, and how these train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from lora.adapters.apply import applied_lora, train_token_rows
from lora.data.tokenizers.subword import TextTokenizer
from lora.decoder.language_model import LanguageModel
from lora.errors import ConfigError
from lora.layers.token_tables import find_token_tables, mean_row
from lora.layers.vocabulary import resize_vocabulary


def add_tokens_to_lora(
    model: LanguageModel, tokenizer: TextTokenizer, tokens: Sequence[str]
) -> str | None:
    """Changes `model`, which has LoRA, in place: the embedding rows of `tokens` train too.

    `tokenizer` has the tokens already. Returns a sentence for the log, or None without tokens.
    Raises ConfigError if the adapter on `model` trains tokens already, but not all of these.
    """
    if not tokens:
        return None
    ids, rows_before = tokenizer.ids_of(tokens), model.config.vocab_size
    layers = applied_lora(model).trainable_tokens
    if not layers:
        train_token_rows(model, ids, n_known=tokenizer.n_known)
        return _describe(tokenizer, tokens, rows_before, model)
    trained = {number for layer in layers.values() for number in layer.ids}
    missing = [token for token, number in zip(tokens, ids, strict=True) if number not in trained]
    if missing:
        raise ConfigError(
            f"Cannot add special_tokens={missing!r}: the adapter trains other tokens, and more "
            "cannot join them. Merge it (lora merge), and add them to the merged model."
        )
    return _describe(tokenizer, tokens, rows_before, model)


@torch.no_grad()
def add_tokens_to_all(
    model: LanguageModel, tokenizer: TextTokenizer, tokens: Sequence[str]
) -> str | None:
    """Changes `model`, for full fine-tuning, in place: its tables get a row for each of `tokens`.

    New rows start at the mean of the known ones, as they do beside LoRA. Returns a sentence for the
    log, or None without tokens.
    """
    if not tokens:
        return None
    ids, rows_before = tokenizer.ids_of(tokens), model.config.vocab_size
    resize_vocabulary(model, max(rows_before, max(ids) + 1))
    known = tokenizer.n_known
    new = [number for number in ids if known is not None and number >= known]
    for table in find_token_tables(model).by_name.values():
        weight = cast(Tensor, table.weight)
        if new:  # a tied head's weight is written twice, with the same mean
            weight[new] = mean_row(weight, min(new)).to(weight)
    return _describe(tokenizer, tokens, rows_before, model)


def _describe(
    tokenizer: TextTokenizer, tokens: Sequence[str], rows_before: int, model: LanguageModel
) -> str:
    known = tokenizer.vocab_size if tokenizer.n_known is None else tokenizer.n_known
    named = [
        f"{token} {number}{'' if number >= known else ' (known already)'}"
        for token, number in zip(tokens, tokenizer.ids_of(tokens), strict=True)
    ]
    rows = model.config.vocab_size
    grown = f"the vocabulary grows from {rows_before:,} to {rows:,} rows"
    change = grown if rows > rows_before else f"its {rows:,} rows have room for them"
    return f"special tokens: {', '.join(named)}; {change}"
