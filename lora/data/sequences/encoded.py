"""The result of tokenising examples: documents, and counts of what was cut or left out."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lora.data.sequences.documents import Documents
from lora.errors import DataError


@dataclass(frozen=True)
class EncodingCounts:
    """How many examples were cut, split or left out."""

    n_examples: int = 0
    n_truncated: int = 0
    """Examples that lost their end because they were too long."""
    n_split: int = 0
    """Examples that were split over several sequences because they were too long."""
    n_dropped: int = 0
    """Examples that were left out because they were too long."""
    n_cut_tokens: int = 0
    """Tokens of truncated and dropped examples that are in no sequence."""
    n_nothing_to_learn: int = 0
    """Examples without a single target token; they are in no sequence."""
    n_lost_turns: int = 0
    """Answers that could not be located in the chat template's output."""


@dataclass(frozen=True)
class EncodedExamples:
    """Examples as documents of at most `max_length` tokens, each with at least one target."""

    documents: Documents
    counts: EncodingCounts
    lengths: NDArray[np.int64]
    """Tokens of each example, before anything was cut, (n_examples,)."""
    dropped_fields: dict[str, int] = field(default_factory=dict)
    """Number by name of the fields that the chat template has no place for."""
    control_tokens: dict[int, int] = field(default_factory=dict)
    """Number by example of special tokens that messages spell out, and that are split."""
    plain_control_tokens: dict[int, int] = field(default_factory=dict)
    """Number by example of special tokens that plain texts spell out, and that stay."""
    parted_prompts: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Texts whose prompt is tokenised apart from its answer, because together their tokens are
    others than those that are asked: by example, the characters before and after the border."""


def check_has_targets(encoded: EncodedExamples, learn_on: str) -> None:
    """Raise DataError, with the reasons, if no token at all counts in the loss."""
    if encoded.documents.n_target_tokens:
        return
    counts = encoded.counts
    reasons = {
        f"{counts.n_dropped} were dropped as too long": counts.n_dropped,
        f"{counts.n_truncated} were truncated before their answers": counts.n_truncated,
        f"{counts.n_lost_turns} answers cannot be located in the chat template's output": (
            counts.n_lost_turns
        ),
    }
    seen = "; ".join(reason for reason, count in reasons.items() if count)
    raise DataError(
        f"Cannot train on {learn_on!r} tokens: none of {counts.n_examples} examples has one: "
        f"{seen or 'they have no answers'}. Raise max_length, set learn_on to 'all', or give a "
        "chat template with generation blocks."
    )
