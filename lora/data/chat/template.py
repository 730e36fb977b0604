"""Chat templates: conversations to text, exactly as transformers renders them.

Templates are untrusted code. They run in jinja2's sandbox, on plain values only, with limits on
their size, on the text they produce and on the time they take. The environment, its filters and
functions follow the documentation of transformers' chat templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, cast

import jinja2
from jinja2.sandbox import SecurityError

from lora.data.chat.template_environment import TemplateEnvironment
from lora.data.chat.template_limits import MAX_CHARACTERS, add_checks
from lora.data.reading.cells import check_text
from lora.data.reading.messages import Message
from lora.errors import DataError

Span = tuple[int, int]
"""First character, and the one after the last."""

MAX_TEMPLATE_BYTES = 256 * 1024
MAX_RENDERED_CHARACTERS = MAX_CHARACTERS

_BEGIN, _END = "\ufdd0", "\ufdd1"  # noncharacters, which Unicode reserves for internal use
_MARKS = re.compile(f"[{_BEGIN}{_END}]")
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

# What a template can raise besides jinja2's errors: it computes with strings, numbers and lists.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RuntimeError,
    MemoryError,
)


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the jinja2 source, at most MAX_TEMPLATE_BYTES.
        special_tokens: the template's variables bos_token, eos_token and so on.
        name: its name in error messages.
        now: the time for `strftime_now`; None uses the clock, so the text differs from day to day.

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
    ) -> None:
        n_bytes = len(source.encode(errors="replace"))
        if n_bytes > MAX_TEMPLATE_BYTES:
            raise DataError(
                f"Cannot use {name}: it has {n_bytes:,} bytes. Allowed: {MAX_TEMPLATE_BYTES:,}. "
                "Give another with chat_template."
            )
        self.source, self.name = source, name
        self._special_tokens = dict(special_tokens or {})
        self._plain = _compile(source, name, now, begin="", end="")
        self._marked = _compile(source, name, now, begin=_BEGIN, end=_END)
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
        return self._render(self._plain, messages, tools, documents, add_generation_prompt)

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
        marked = self._render(self._marked, messages, tools, documents, False)
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
        template: jinja2.Template,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None,
        documents: Sequence[dict[str, Any]] | None,
        add_generation_prompt: bool,
    ) -> str:
        values = {
            **self._special_tokens,
            "messages": [_with_reasoning(message) for message in messages],
            "tools": None if tools is None else list(tools),
            "documents": None if documents is None else list(documents),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = _join(template, values)
        except _TEMPLATE_ERRORS as error:
            problem = str(error) or type(error).__name__
            raise DataError(f"{self.name} rejects the conversation: {problem}") from None
        check_text(text, f"the output of {self.name}")
        return text


def _join(template: jinja2.Template, values: dict[str, Any]) -> str:
    environment = cast(TemplateEnvironment, template.environment)
    environment.start_clock()
    pieces, length = [], 0
    for piece in template.generate(values):
        length += len(piece)
        if length > MAX_RENDERED_CHARACTERS:
            raise SecurityError(f"it produces more than {MAX_RENDERED_CHARACTERS:,} characters")
        environment.check_time()
        pieces.append(piece)
    return "".join(pieces)


def _with_reasoning(message: Message) -> Message:
    """Return the message with its reasoning under both names that templates use."""
    if message.keys().isdisjoint(_REASONING_KEYS):
        return message
    known = [message[key] for key in _REASONING_KEYS if message.get(key) is not None]
    if not known:
        return message
    return {"thinking": known[0], **message, "reasoning_content": known[0]}


def _compile(
    source: str, name: str, now: datetime | None, *, begin: str, end: str
) -> jinja2.Template:
    environment = TemplateEnvironment(begin, end)
    environment.globals["strftime_now"] = lambda form: (now or datetime.now()).strftime(form)
    try:
        return environment.from_string(add_checks(environment.parse(source), environment))
    except jinja2.TemplateSyntaxError as error:
        problem = str(error.message).rstrip(".")
        raise DataError(
            f"Cannot parse {name}: line {error.lineno}: {problem}. Give another with chat_template."
        ) from None
    except (RecursionError, SyntaxError):  # by jinja2's parser, by the Python code it generates
        raise DataError(f"Cannot parse {name}: it is nested too deeply.") from None
