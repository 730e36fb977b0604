"""The texts under the fields of a dataclass, for `help()` and for the flags' help."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import textwrap
from typing import Any, TypeVar

ClassT = TypeVar("ClassT", bound=type)

INDENT = " " * 4
WIDTH = 92


def documented(cls: ClassT) -> ClassT:
    """Changes the dataclass `cls` in place: its `__doc__` goes on with its fields and their texts.

    Python keeps no docstrings of fields, so without this `help(LoRAConfig)` would not show them.
    They are read from the source when `__doc__` is first asked for, not at import.
    """
    own: Any = cls  # a property of the class, for which `type` has no annotation
    own.__doc__ = _WithFields(cls.__doc__ or "")
    return cls


class _WithFields:
    """The `__doc__` of a documented dataclass."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __get__(self, instance: object, owner: type) -> str:
        return f"{inspect.cleandoc(self._text)}\n\nFields:\n{_describe_fields(owner)}"


def _describe_fields(owner: type) -> str:
    texts: dict[str, str] = {}
    for base in reversed(owner.__mro__):
        if dataclasses.is_dataclass(base):
            texts |= texts_of_module(base.__module__).get(base.__name__, {})
    lines = []
    for field in dataclasses.fields(owner):
        lines.append(f"{INDENT}{field.name}: {field.type}{_describe_default(field)}")
        text = " ".join(texts.get(field.name, "").split())
        lines += textwrap.wrap(text, WIDTH, initial_indent=2 * INDENT, subsequent_indent=2 * INDENT)
    return "\n".join(lines)


def _describe_default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {field.default!r}"
    if field.default_factory is not dataclasses.MISSING:
        factory: Any = field.default_factory
        return f" = {factory.__name__}()"
    return ""


@functools.lru_cache
def texts_of_module(name: str) -> dict[str, dict[str, str]]:
    """Return by class of a module, then by field, the string that stands under the field.

    Nothing where the source is not there.
    """
    try:
        source = inspect.getsource(importlib.import_module(name))
    except OSError:  # installed without its source
        return {}
    return {
        owner.name: {
            field.target.id: text.value.value
            for field, text in zip(owner.body, owner.body[1:], strict=False)
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        }
        for owner in ast.parse(source).body
        if isinstance(owner, ast.ClassDef)
    }
