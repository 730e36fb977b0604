"""Chat templates: conversations to text, exactly as transformers renders them.

Templates are strangers' code. They run in jinja2's sandbox, on plain values only, with limits on
their size, on the text they make and on the time they take.

The extension tag `{% generation %}` … `{% endgeneration %}` marks what the assistant writes. The
environment, its filters and functions follow the documentation of transformers' chat templates.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, MutableMapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from lora.data.chat.template_limits import (
    MAX_CHARACTERS,
    add_checks,
    check_binop,
    check_method,
    concat,
    guard_filters,
)
from lora.data.reading.messages import Message, check_text
from lora.errors import DataError

Span = tuple[int, int]
"""First character and the one after the last."""

MAX_TEMPLATE_BYTES = 256 * 1024
MAX_RENDERED_CHARACTERS = MAX_CHARACTERS
MAX_RENDER_S = 5.0
"""Of this thread's own time, so that a busy machine refuses no template."""

_BEGIN, _END = "\ufdd0", "\ufdd1"  # no characters, by Unicode's own word: free for inside use
_MARKS = re.compile(f"[{_BEGIN}{_END}]")
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_LOOP_VALUES = frozenset(("index", "index0", "first", "last", "length"))
_DICT_NAMES = frozenset(dir(dict))

# What a template can raise, beside jinja2's own: it computes with strings, numbers and lists.
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
        source: the jinja text, at most MAX_TEMPLATE_BYTES.
        special_tokens: what the template sees as bos_token, eos_token and so on.
        name: what error messages call it.
        now: what `strftime_now` tells; None asks the clock, so that rows differ from day to day.

    Raises:
        DataError: the template is too long or no jinja.
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
                f"{name} has {n_bytes:,} bytes: at most {MAX_TEMPLATE_BYTES:,} are read. "
                "Give the model's real template with chat_template."
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

        With `add_generation_prompt` it ends where the assistant's next turn begins. The text holds
        the special tokens that the model wants: tokenise it with none added.

        Raises DataError with the template's own words if it refuses the conversation, fails, or
        passes a limit.
        """
        return self._render(self._plain, messages, tools, documents, add_generation_prompt)

    def render_with_spans(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
    ) -> tuple[str, list[Span]]:
        """Return the text of a conversation and what stands in the template's generation blocks.

        Raises DataError as `render` does.
        """
        values = [messages, tools, documents]
        if _MARKS.search(json.dumps(values, ensure_ascii=False, default=str)):
            raise DataError(
                "The conversation holds U+FDD0 or U+FDD1, which are no characters: remove them."
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
            raise DataError(f"{self.name} refuses the conversation: {problem}") from None
        check_text(text, f"what {self.name} makes of the conversation")
        return text


def _join(template: jinja2.Template, values: dict[str, Any]) -> str:
    environment = cast(_Environment, template.environment)
    environment.deadline_s = time.thread_time() + MAX_RENDER_S
    pieces, length = [], 0
    for piece in template.generate(values):
        length += len(piece)
        if length > MAX_RENDERED_CHARACTERS:
            raise SecurityError(f"it makes more than {MAX_RENDERED_CHARACTERS:,} characters")
        environment.check_time()
        pieces.append(piece)
    return "".join(pieces)


def _with_reasoning(message: Message) -> Message:
    """Return the message with its reasoning under the names by which templates look for it."""
    if message.keys().isdisjoint(_REASONING_KEYS):
        return message
    known = [message[key] for key in _REASONING_KEYS if message.get(key) is not None]
    if not known:
        return message
    return {"thinking": known[0], **message, "reasoning_content": known[0]}


def _compile(
    source: str, name: str, now: datetime | None, *, begin: str, end: str
) -> jinja2.Template:
    environment = _Environment(begin, end)
    environment.globals["strftime_now"] = lambda form: (now or datetime.now()).strftime(form)
    try:
        return environment.from_string(add_checks(environment.parse(source), environment))
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"{name} is no chat template that can be read: line {error.lineno}: {error.message}. "
            "Give another with chat_template."
        ) from None
    except (RecursionError, SyntaxError):  # of jinja's reader, of the Python that jinja writes
        raise DataError(f"{name} is nested too deeply to be read.") from None


class _Generation(Extension):
    """The tag `{% generation %}`, which puts the environment's marks around its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        environment = cast(_Environment, self.environment)
        return f"{environment.begin}{caller()}{environment.end}"


class _Environment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with what chat templates expect, and limits on time and on repetition."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self, begin: str, end: str) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self.begin, self.end = begin, end
        self.deadline_s = 0.0
        self.filters["tojson"] = _to_json
        guard_filters(self.filters)
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["dict"] = _build_dict
        self.globals["namespace"] = _SafeNamespace

    def make_globals(self, d: MutableMapping[str, Any] | None) -> MutableMapping[str, Any]:
        """Return a plain dict: jinja2's chain of two is most of what a short render costs."""
        return {**self.globals, **(d or {})}

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Look names up as the sandbox does; what it allows at once is found without its checks."""
        if type(obj) is LoopContext and attribute in _LOOP_VALUES:
            return getattr(obj, attribute)
        if type(obj) is dict and attribute in obj and attribute not in _DICT_NAMES:
            return obj[attribute]  # no attribute of a dict: the sandbox would take the item too
        return super().getattr(obj, attribute)

    def check_time(self) -> None:
        """Raise SecurityError if the template has had its time."""
        if time.thread_time() > self.deadline_s:
            raise SecurityError(f"it takes more than {MAX_RENDER_S:.0f} s")

    def checked_concat(self, *values: object) -> str:
        """Return the texts of `values`, one after the other."""
        return concat(*values)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.check_time()
        check_method(obj, args, kwargs)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_binop(operator, left, right)
        return super().call_binop(context, operator, left, right)


class _SafeNamespace(Namespace):
    """jinja2's namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace holds no names such as {name!r}")


def _build_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON without HTML's escapes, which jinja2's own filter would put in."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
