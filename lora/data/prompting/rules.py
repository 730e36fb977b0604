"""Rules of reading: what rows of known columns become, beside what the rows themselves say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lora.config import DataConfig
from lora.data.prompting.column_map import check_column_map
from lora.data.prompting.row_template import RowTemplate, parse_template
from lora.runs.record import PromptFormat


@dataclass(frozen=True)
class ReadingRules:
    """How rows become examples."""

    as_turns: bool = False
    """A prompt and its completion become a user and an assistant turn; else they are plain text."""
    only_raw: bool = False
    """The setting raw is true: what needs a chat template is refused."""
    system: str | None = None
    """System prompt of conversations that have none of their own."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The column of each part that has another name, or "" for one that is left out."""
    template: RowTemplate | None = None
    """What makes the prompt and the completion of every row."""
    label_template: RowTemplate | None = None
    """The same for rows with the columns text and label; None: it is made of their labels."""
    labels: tuple[str, ...] | None = None
    """Labels that training had; None before they are known."""


def rules_for(
    config: DataConfig, *, has_template: bool, trained: PromptFormat | None = None
) -> ReadingRules:
    """Return the rules that the settings ask for.

    Args:
        config: the settings.
        has_template: whether the model comes with a chat template, that is, is a chat model.
        trained: how an adapter was trained: examples are read the same way where `config` does not
            say otherwise.

    Raises ConfigError for settings of the wrong type, or that exclude each other.
    """
    check_column_map(config.columns)
    is_raw = config.raw
    if is_raw is None and trained is not None and trained.completions is not None:
        is_raw = trained.completions == "raw"
    if is_raw is None:
        is_raw = not has_template and config.chat_template is None
    template = parse_template(config.template) if config.template else None
    return ReadingRules(
        as_turns=not is_raw,
        only_raw=config.raw is True,
        system=config.system or None,
        columns=config.columns,
        template=template,
        label_template=None if trained is None else _recorded(trained.label_template),
        labels=None if trained is None else trained.labels,
    )


def _recorded(source: str | None) -> RowTemplate | None:
    return None if source is None else parse_template(source, has_escapes=False)
