"""Limits on an untrusted chat template: time, and the size of intermediate values.

jinja2's sandbox keeps a template away from Python's internals, but not from running forever or
building one enormous string. Here each loop checks the clock, and operations that multiply the
sizes of their operands are checked against a limit before they are computed.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, MutableMapping
from types import BuiltinMethodType, FunctionType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import SecurityError
from jinja2.visitor import NodeTransformer

MAX_CHARACTERS = 64 * 1024 * 1024
"""Of one string."""
MAX_ITEMS = 2**20
"""Of one list."""
MAX_WIDTH = 10_000
"""Width to which a string may be padded or indented."""
_MAX_POWER_BITS = 4096
_WIDE = re.compile(r"\d{6,}")
_NESTED_WIDTH = re.compile(r":[^{}]*\{")
_PADDING = ("center", "expandtabs", "ljust", "rjust", "zfill")


def add_checks(tree: nodes.Template, environment: jinja2.Environment) -> nodes.Template:
    """Changes `tree` in place: loops call `check_time`, `~` calls `checked_concat`."""
    _Checks(environment).visit(tree)
    return tree


class _Checks(NodeTransformer):
    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        call = self._call("check_time", [], node.lineno)
        node.body.insert(0, nodes.ExprStmt(call, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return self._call("checked_concat", node.nodes, node.lineno)

    def _call(self, name: str, values: list[nodes.Expr], line: int) -> nodes.Call:
        function = nodes.EnvironmentAttribute(name, lineno=line)
        call = nodes.Call(function, values, [], None, None, lineno=line)
        call.set_environment(self._environment)
        return call


def concat(*values: object) -> str:
    """Return the texts of `values`, concatenated, as `~` does."""
    texts = [str(value) for value in values]
    _check_size(sum(map(len, texts)), "~")
    return "".join(texts)


def check_binop(operator: str, left: object, right: object) -> None:
    """Raise SecurityError if `left operator right` would be enormous."""
    if operator == "*":
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                _check_size(len(sequence) * times, operator, sequence)
    elif operator == "+" and isinstance(left, str | list | tuple) and type(left) is type(right):
        _check_size(len(left) + len(right), operator, left)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * right > _MAX_POWER_BITS:
            raise SecurityError("it computes ** with values that are too large")
    elif operator == "%" and isinstance(left, str):
        _check_format(left, right if isinstance(right, tuple) else (right,), "*" in left)


def check_method(method: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise SecurityError if `method`, a string's, would build an enormous string."""
    if isinstance(method, FunctionType):  # the sandbox's wrapper of str.format
        method = inspect.unwrap(method)
    if not isinstance(method, BuiltinMethodType) or not isinstance(method.__self__, str):
        return
    text, name = method.__self__, method.__name__
    if name in _PADDING:
        _check_widths(args, kwargs)
    elif name == "replace":
        _check_replace(text, *args[:2])
    elif name == "join" and args:
        _check_join(args[0], text)
    elif name in ("format", "format_map"):
        values = (*args, *kwargs.values())
        _check_format(text, values, _NESTED_WIDTH.search(text) is not None)
    elif name == "translate":
        raise SecurityError("it calls translate, which no chat template needs")


def guard_filters(filters: MutableMapping[str, Callable[..., Any]]) -> None:
    """Changes `filters` in place: those that can build large values check their arguments."""
    for name in ("batch", "center", "format", "indent", "join", "replace", "slice", "tojson"):
        filters[name] = _guarded(name, filters[name])


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    skipped = 1 if "jinja_pass_arg" in vars(function) else 0  # jinja2 passes its context first

    @functools.wraps(function)  # keeps jinja2's mark of what it passes
    def guarded(*args: Any, **kwargs: Any) -> Any:
        value, *rest = args[skipped:]
        if name == "replace" and isinstance(value, str):
            _check_replace(value, *(str(word) for word in rest[:2]))
        elif name == "join":
            value = value if isinstance(value, list | tuple) else list(value)
            _check_join(value, str((*rest, kwargs.get("d", ""))[0]))
            args = (*args[:skipped], value, *rest)
        elif name == "format":
            values = (*rest, *kwargs.values())
            _check_format(str(value), values, "*" in str(value))
        elif name not in ("join", "replace"):
            _check_widths(tuple(rest), kwargs)
        return function(*args, **kwargs)

    return guarded


def _check_size(size: int, what: str, sequence: object = "") -> None:
    limit = MAX_CHARACTERS if isinstance(sequence, str) else MAX_ITEMS
    if size > limit:
        raise SecurityError(f"it computes {what} with values that are too large")


def _check_widths(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and value > MAX_WIDTH:
            raise SecurityError(f"it pads a string to {value:,} characters, which is too large")


def _check_replace(text: str, old: object = "", new: object = "") -> None:
    if isinstance(old, str) and isinstance(new, str):
        _check_size(len(text) + text.count(old) * len(new), "replace")


def _check_join(values: object, between: str) -> None:
    if isinstance(values, list | tuple):
        n_known = sum(len(value) for value in values if isinstance(value, str))
        _check_size(n_known + len(values) * len(between), "join")


def _check_format(text: str, values: tuple[Any, ...], has_widths: bool) -> None:
    longest = max((len(value) for value in values if isinstance(value, str)), default=1)
    _check_size(len(text) + max(text.count("%"), text.count("{")) * longest, "format")
    if _WIDE.search(text):
        raise SecurityError("it formats to a width that is too large")
    if has_widths:
        _check_widths(values, {})
