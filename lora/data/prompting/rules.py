"""Rules of reading: what rows of known columns become, beside what the rows themselves say."""

from __future__ import annotations

from dataclasses import dataclass

from lora.config import DataConfig
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


def rules_for(
    config: DataConfig, *, has_template: bool, trained: PromptFormat | None = None
) -> ReadingRules:
    """Return the rules that the settings ask for.

    Args:
        config: the settings.
        has_template: whether the model comes with a chat template, that is, is a chat model.
        trained: how an adapter was trained: examples are read the same way where `config` does not
            say otherwise.
    """
    is_raw = config.raw
    if is_raw is None and trained is not None and trained.completions is not None:
        is_raw = trained.completions == "raw"
    if is_raw is None:
        is_raw = not has_template and config.chat_template is None
    return ReadingRules(
        as_turns=not is_raw, only_raw=config.raw is True, system=config.system or None
    )
