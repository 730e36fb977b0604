"""The number of positions that a model was trained for, compared with the sequences it gets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora.errors import ConfigError

if TYPE_CHECKING:
    from lora.decoder.language_model import LanguageModel


def describe_excess(n_tokens: int, n_positions: int) -> str | None:
    """Return a warning with both numbers if there are more tokens than positions, else None."""
    if n_tokens <= n_positions:
        return None
    return (
        f"a sequence has {n_tokens:,} tokens, but the model has {n_positions:,} positions "
        "(max_position_embeddings): it was not trained beyond them; shorten the sequences"
    )


def check_positions(model: LanguageModel, n_tokens: int) -> None:
    """Raise ConfigError if sequences of `n_tokens` outgrow the table of positions.

    A packed sequence counts whole: its padding can have positions beyond those of its examples.
    """
    limit = model.position_table_rows
    if limit is not None and n_tokens > limit:
        raise ConfigError(
            f"Cannot train on sequences of {n_tokens:,} tokens: this {model.config.family!r} model "
            f"has position embeddings for {limit:,} only. Use --max-length {limit} "
            f"(max_length={limit}), or a smaller one."
        )
