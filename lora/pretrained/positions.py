"""The number of positions that a model was trained for, compared with the sequences it gets."""

from __future__ import annotations


def describe_excess(n_tokens: int, n_positions: int) -> str | None:
    """Return a warning with both numbers if there are more tokens than positions, else None."""
    if n_tokens <= n_positions:
        return None
    return (
        f"a sequence has {n_tokens:,} tokens, but the model has {n_positions:,} positions "
        "(max_position_embeddings): it was not trained beyond them; shorten the sequences"
    )
