"""A chat template rendered in this process: compiled by jinja2, run in its sandbox.

The sandbox checks the clock in loops and calls, and sizes before they are multiplied. One long call
inside C is beyond it: `template_workers.py` runs this in a subprocess with hard limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol, cast

import jinja2
from jinja2.sandbox import SecurityError

from lora.data.chat import template_environment
from lora.data.chat.template_environment import TemplateEnvironment, TimeLimitError
from lora.data.chat.template_limits import MAX_CHARACTERS, add_checks
from lora.errors import DataError

# What a template can raise besides jinja2's errors: it computes with strings, numbers and lists.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RuntimeError,
)


class TemplateLimitError(DataError):
    """A chat template exceeded its limit on time or memory: no other conversation is tried."""


@dataclass(frozen=True)
class TemplateSource:
    """A chat template as text."""

    source: str
    """In jinja2's language."""
    name: str
    """In error messages."""
    now: datetime | None = None
    """The time for `strftime_now`; None uses the clock."""


class TemplateRenderer(Protocol):
    """What turns a template's values into text."""

    def render(self, values: dict[str, Any], begin: str, end: str) -> str:
        """Return the text, with `begin` and `end` around each generation block.

        Raises DataError if the template rejects the values, TemplateLimitError if it takes too much
        time or memory.
        """


class LocalRenderer:
    """Renders in this process. Raises DataError if the source is not valid jinja2."""

    memory_limit = "there is"
    """For the message when memory runs out."""

    def __init__(self, source: TemplateSource) -> None:
        self._source = source
        self._compiled: dict[tuple[str, str], jinja2.Template] = {}
        self._template("", "")

    def render(self, values: dict[str, Any], begin: str, end: str) -> str:
        """Return the text; see TemplateRenderer."""
        name = self._source.name
        try:
            return _join(self._template(begin, end), values)
        except TimeLimitError as error:
            raise TemplateLimitError(f"{name} rejects the conversation: {error}") from None
        except _TEMPLATE_ERRORS as error:
            problem = str(error) or type(error).__name__
            raise DataError(f"{name} rejects the conversation: {problem}") from None
        except MemoryError:
            raise TemplateLimitError(
                f"{name} rejects the conversation: it takes more memory than {self.memory_limit}"
            ) from None

    def _template(self, begin: str, end: str) -> jinja2.Template:
        marks = (begin, end)
        if marks not in self._compiled:
            self._compiled[marks] = _compile(self._source, begin, end)
        return self._compiled[marks]


def _join(template: jinja2.Template, values: dict[str, Any]) -> str:
    environment = cast(TemplateEnvironment, template.environment)
    environment.start_clock(template_environment.MAX_RENDER_S)
    pieces, length = [], 0
    for piece in template.generate(values):
        length += len(piece)
        if length > MAX_CHARACTERS:
            raise SecurityError(f"it produces more than {MAX_CHARACTERS:,} characters")
        environment.check_time()
        pieces.append(piece)
    return "".join(pieces)


def _compile(source: TemplateSource, begin: str, end: str) -> jinja2.Template:
    environment, now = TemplateEnvironment(begin, end), source.now
    environment.globals["strftime_now"] = lambda form: (now or datetime.now()).strftime(form)
    try:
        return environment.from_string(add_checks(environment.parse(source.source), environment))
    except jinja2.TemplateSyntaxError as error:
        problem = str(error.message).rstrip(".")
        raise DataError(
            f"Cannot parse {source.name}: line {error.lineno}: {problem}. Give another with "
            "chat_template."
        ) from None
    except (RecursionError, SyntaxError):  # by jinja2's parser, by the Python code it generates
        raise DataError(f"Cannot parse {source.name}: it is nested too deeply.") from None
