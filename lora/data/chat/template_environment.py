"""The jinja2 environment of chat templates: sandboxed, limited, with transformers' additions.

The extension tag `{% generation %}` … `{% endgeneration %}` marks what the assistant writes.
"""

from __future__ import annotations

import json
import time
from collections.abc import MutableMapping
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from lora.data.chat.template_limits import check_binop, check_method, concat, guard_filters

MAX_RENDER_S = 5.0
"""CPU time of this thread, so that a busy machine does not refuse a template."""


class TimeLimitError(SecurityError):
    """The template ran for longer than MAX_RENDER_S."""


_LOOP_VALUES = frozenset(("index", "index0", "first", "last", "length"))
_DICT_NAMES = frozenset(dir(dict))


class _Generation(Extension):
    """The tag `{% generation %}`: puts the environment's markers around its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        environment = cast(TemplateEnvironment, self.environment)
        return f"{environment.begin}{caller()}{environment.end}"


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with what chat templates expect, and limits on time and sizes."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self, begin: str, end: str) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self.begin, self.end = begin, end
        self._limit_s = self._deadline_s = 0.0
        self.filters["tojson"] = _to_json
        guard_filters(self.filters)
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["dict"] = _build_dict
        self.globals["namespace"] = _SafeNamespace

    def make_globals(self, d: MutableMapping[str, Any] | None) -> MutableMapping[str, Any]:
        """Return a plain dict: jinja2's ChainMap is most of the cost of a short render."""
        return {**self.globals, **(d or {})}

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Look up names as the sandbox does; clearly safe ones skip its checks, for speed."""
        if type(obj) is LoopContext and attribute in _LOOP_VALUES:
            return getattr(obj, attribute)
        if type(obj) is dict and attribute in obj and attribute not in _DICT_NAMES:
            return obj[attribute]  # not a dict attribute: the sandbox would return the item too
        return super().getattr(obj, attribute)

    def start_clock(self, limit_s: float) -> None:
        """Give the template `limit_s` of CPU time from now on."""
        self._limit_s, self._deadline_s = limit_s, time.thread_time() + limit_s

    def check_time(self) -> None:
        """Raise SecurityError if the template has run out of time."""
        if time.thread_time() > self._deadline_s:
            raise TimeLimitError(f"it takes more than {self._limit_s:.0f} s")

    def checked_concat(self, *values: object) -> str:
        """Return the texts of `values`, concatenated."""
        return concat(*values)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.check_time()
        check_method(obj, args, kwargs)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_binop(operator, left, right)
        return super().call_binop(context, operator, left, right)


class _SafeNamespace(Namespace):
    """jinja2's namespace, but without names that begin with an underscore."""

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
        raise SecurityError(f"a namespace cannot have names such as {name!r}")


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
    """Write JSON without HTML escapes, which jinja2's own filter adds."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
