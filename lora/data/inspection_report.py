"""The report of `lora data` as dataclasses: what was read, and what training would use."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from lora.data.sequences.encoded import EncodingCounts
from lora.runs.typed_json import json_text


@dataclass(frozen=True)
class Preview:
    """The beginning of one example as the model sees it."""

    source: str
    spans: list[tuple[str, bool]]
    """Text, and whether its tokens are targets."""
    n_more_tokens: int
    """Tokens after those shown."""


@dataclass
class DataReport:
    """What was read from the data, and what would be trained on. Fields are the JSON's keys."""

    source: str
    max_length: int
    learn_on: str
    errors: list[str] = field(default_factory=list)
    """What prevents training."""
    warnings: list[str] = field(default_factory=list)
    """What is probably a mistake."""
    notes: list[str] = field(default_factory=list)
    n_examples: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    """Number of examples by format."""
    template_origin: str | None = None
    """Where the chat template comes from; None without conversations."""
    quantiles_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens of the shortest, median, 95th-percentile and longest example, before any cut."""
    histogram: list[tuple[int, int, int]] = field(default_factory=list)
    """Fewest tokens, most tokens, number of examples."""
    n_learned_tokens: int = 0
    """Target tokens: those that count in the loss."""
    n_ignored_tokens: int = 0
    """Tokens in sequences that are context only."""
    n_rows: int = 0
    """Sequences."""
    fill_fraction: float = 0.0
    """Fraction of the sequences' positions that hold a token rather than padding."""
    counts: EncodingCounts = field(default_factory=EncodingCounts)
    """Examples that were cut, split or left out."""
    n_without_end: int = 0
    """Uncut examples in which no end-of-turn or end-of-text token is a target."""
    n_duplicates: int = 0
    """Examples with exactly the content of an earlier one."""
    n_empty_answers: int = 0
    columns: dict[str, int] = field(default_factory=dict)
    """Number of rows by column that is used."""
    unused_columns: dict[str, int] = field(default_factory=dict)
    """Number of rows by column that has a value and is not used."""
    dropped_fields: dict[str, int] = field(default_factory=dict)
    """Number by name of the fields that the chat template has no place for."""
    n_control_tokens: int = 0
    """Special tokens that messages spell out, and that are split into ordinary tokens."""
    n_plain_control_tokens: int = 0
    """Special tokens that plain texts spell out, and that stay special tokens."""
    n_media_placeholders: int = 0
    """Examples with a placeholder of an image, a video or audio, which is learned as a word."""
    n_parted_prompts: int = 0
    """Examples whose prompt is tokenised apart from its answer, as it is when it is asked."""
    n_flagged: int = 0
    """Examples in which a loss flag turns an answer into context."""
    special_tokens: dict[str, int] = field(default_factory=dict)
    """How often each added special token occurs in the sequences."""
    previews: list[Preview] = field(default_factory=list)

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest sequence, cut to `max_length`."""
        return min(self.max_length, self.quantiles_tokens.get("longest", 0))

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json_text(dataclasses.asdict(self), indent=2, ensure_ascii=False)
