"""Chat templates: conversations to text, exactly as transformers renders them.

Templates are untrusted code. They run in jinja2's sandbox, on plain values only, in a subprocess
with hard limits on time and memory (`template_workers.py`). The environment, its filters and
functions follow the documentation of transformers' chat templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from lora.data.chat.template_renderer import TemplateRenderer, TemplateSource
from lora.data.chat.template_workers import open_renderer
from lora.data.reading.cells import check_text
from lora.data.reading.messages import Message
from lora.errors import DataError

Span = tuple[int, int]
"""First character, and the one after the last."""

MAX_TEMPLATE_BYTES = 256 * 1024

_BEGIN, _END = "\ufdd0", "\ufdd1"  # noncharacters, which Unicode reserves for internal use
_MARKS = re.compile(f"[{_BEGIN}{_END}]")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message that hold its reasoning."""


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the jinja2 source, at most MAX_TEMPLATE_BYTES.
        special_tokens: the template's variables bos_token, eos_token and so on.
        name: its name in error messages.
        now: the time for `strftime_now`; None uses the clock, so the text differs from day to day.
        renderer: what renders it; None: a subprocess with limits, or this process for known ones.

    Raises:
        DataError: the template is too long or not valid jinja2.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        name: str = "the chat template",
        now: datetime | None = None,
        renderer: TemplateRenderer | None = None,
    ) -> None:
        n_bytes = len(source.encode(errors="replace"))
        if n_bytes > MAX_TEMPLATE_BYTES:
            raise DataError(
                f"Cannot use {name}: it has {n_bytes:,} bytes. Allowed: {MAX_TEMPLATE_BYTES:,}. "
                "Give another with chat_template."
            )
        self.source, self.name, self.now = source, name, now
        self.special_tokens = dict(special_tokens or {})
        self.renderer = renderer or open_renderer(TemplateSource(source, name, now))
        self.has_generation_blocks = bool(re.search(r"\{%-?\s*generation\s*-?%\}", source))
        """Whether the template itself marks what the assistant writes."""

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return the text of a conversation.

        With `add_generation_prompt` it ends where the assistant's next turn begins. The text has
        all special tokens that the model needs: tokenise it without adding any.

        Raises DataError with the template's own message if it rejects the conversation, fails, or
        exceeds a limit.
        """
        return self._render("", "", messages, tools, documents, add_generation_prompt)

    def render_with_spans(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
    ) -> tuple[str, list[Span]]:
        """Return the text of a conversation and the spans of the template's generation blocks.

        Raises DataError as `render` does.
        """
        values = [messages, tools, documents]
        if _MARKS.search(json.dumps(values, ensure_ascii=False, default=str)):
            raise DataError(
                "Cannot render the conversation: it has U+FDD0 or U+FDD1, which are not "
                "characters. Remove them."
            )
        marked = self._render(_BEGIN, _END, messages, tools, documents, False)
        pieces, spans, length = _MARKS.split(marked), [], 0
        for number, mark in enumerate(_MARKS.findall(marked)):
            length += len(pieces[number])
            if mark == _BEGIN:
                spans.append((length, length))
            elif spans:
                spans[-1] = (spans[-1][0], length)
        return "".join(pieces), spans

    def _render(
        self,
        begin: str,
        end: str,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None,
        documents: Sequence[dict[str, Any]] | None,
        add_generation_prompt: bool,
    ) -> str:
        values = {
            **self.special_tokens,
            "messages": [_with_reasoning(message) for message in messages],
            "tools": None if tools is None else list(tools),
            "documents": None if documents is None else list(documents),
            "add_generation_prompt": add_generation_prompt,
        }
        text = self.renderer.render(values, begin, end)
        check_text(text, f"the output of {self.name}")
        return text


def _with_reasoning(message: Message) -> Message:
    """Return the message with its reasoning under both names that templates use."""
    if message.keys().isdisjoint(REASONING_KEYS):
        return message
    known = [message[key] for key in REASONING_KEYS if message.get(key) is not None]
    if not known:
        return message
    return {"thinking": known[0], **message, "reasoning_content": known[0]}
