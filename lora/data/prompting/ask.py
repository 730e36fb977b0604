"""Prompts in use, as they were in training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from lora.data.chat.prompts import Prompt, chat_prompt, plain_prompt
from lora.data.prompting.row_template import RowTemplate, parse_template
from lora.data.reading.messages import Message
from lora.data.tokenizers.subword import TextTokenizer
from lora.errors import ConfigError, DataError
from lora.runs.record import PromptFormat

_SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class Asker:
    """Makes prompts of texts the way that a model was trained, unless the user says otherwise."""

    trained: PromptFormat = field(default_factory=PromptFormat)
    raw: bool | None = None
    """Plain text instead of a chat; None: as in training."""
    system: str | None = None
    """System prompt; None: as in training, "": none."""

    def __post_init__(self) -> None:
        if self.system and self.is_raw:
            why = "" if self.raw else ", as the adapter was trained on"
            raise ConfigError(
                f"Cannot use a system prompt with plain text{why}: it needs the chat template. "
                "Put it into the prompt, or take --no-raw."
            )

    @property
    def is_raw(self) -> bool:
        """Whether texts are continued as they are."""
        return self.trained.style == "raw" if self.raw is None else self.raw

    @property
    def system_prompt(self) -> str | None:
        """The system prompt in use."""
        if self.is_raw:
            return None
        return (self.trained.system if self.system is None else self.system) or None

    @cached_property
    def template(self) -> RowTemplate | None:
        """The template that texts are put into."""
        if self.raw or self.trained.template is None:
            return None
        found = parse_template(self.trained.template, has_escapes=False)
        return found if found.prompt_columns else None

    @property
    def takes_turns(self) -> bool:
        """Whether a conversation of several turns is like the training data."""
        return not self.is_raw and self.template is None

    def prompt(self, text: str, tokenizer: TextTokenizer) -> Prompt:
        """Return the prompt for `text`.

        Raises DataError if the chat template rejects it, or the template needs several columns and
        `text` is no JSON object that has them.
        """
        asked = text if self.template is None else _fill(self.template, text)
        if self.is_raw:
            made = plain_prompt(asked, tokenizer)
        else:
            turn = {"role": "user", "content": asked if self.template is None else asked.rstrip()}
            made = chat_prompt([*self._first(), turn], tokenizer)
        return replace(made, text=text)

    def prompt_after(self, said: Sequence[Message], tokenizer: TextTokenizer) -> Prompt:
        """Return the prompt for the last of the messages of a conversation without its system.

        The earlier ones are left out where the model did not learn from conversations.
        """
        if not self.takes_turns:
            return self.prompt(str(said[-1]["content"]), tokenizer)
        return chat_prompt([*self._first(), *said], tokenizer)

    def _first(self) -> list[Message]:
        system = self.system_prompt
        return [] if system is None else [{"role": "system", "content": system}]

    def describe(self) -> str:
        """Return what is taken from training, in words; "" for a chat without a system prompt."""
        parts = []
        if self.raw is None and self.is_raw:
            parts.append("plain text is continued (--no-raw: the chat template)")
        if self.template is not None:
            prompt = "".join(
                f"{{{t}}}" if is_column else t for is_column, t in self.template.prompt
            )
            parts.append(f"texts are put into {prompt!r} (--raw: as they are)")
        if self.system is None and self.system_prompt is not None:
            parts.append(f"with the system prompt {self.system_prompt!r} (--system replaces it)")
        return f"prompted as in training: {'; '.join(parts)}" if parts else ""


def _fill(template: RowTemplate, text: str) -> str:
    columns = template.prompt_columns
    row = _as_row(text)
    if row is not None and row.keys() >= set(columns):
        return template.fill_prompt(row)
    if len(columns) == 1:
        return template.fill_prompt({columns[0]: text})
    raise DataError(
        f"Cannot ask {text[:_SHOWN_CHARACTERS]!r}: the model was trained on prompts of the columns "
        f"{', '.join(columns)}. Give each prompt as a JSON object with these, or take --raw to ask "
        "the text as it is."
    )


def _as_row(text: str) -> dict[str, Any] | None:
    if not text.lstrip().startswith("{"):
        return None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
