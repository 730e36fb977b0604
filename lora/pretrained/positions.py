"""The number of positions that a model was trained for, compared with the sequences it gets."""

from __future__ import annotations

import json
from pathlib import Path

_KEYS = ("max_position_embeddings", "n_positions")


def why_beyond_positions(folder: Path, n_tokens: int) -> str | None:
    """Return a warning if `n_tokens` are more than the positions of the model in `folder`.

    None if they are not, or if its config.json does not say: loading reports what is wrong there.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    values = [config.get(key) for key in _KEYS] if isinstance(config, dict) else []
    known = [value for value in values if type(value) is int and value > 0]
    return describe_excess(n_tokens, known[0]) if known else None


def describe_excess(n_tokens: int, n_positions: int) -> str | None:
    """Return a warning with both numbers if there are more tokens than positions, else None."""
    if n_tokens <= n_positions:
        return None
    return (
        f"a sequence has {n_tokens:,} tokens, but the model has {n_positions:,} positions "
        "(max_position_embeddings): it was not trained beyond them; shorten the sequences"
    )
