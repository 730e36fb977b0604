"""Unpacking while a GPU's step is traced on tensors without values, on whatever machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_IS_TRACED = ContextVar("is_traced_as_on_gpu", default=False)


@contextmanager
def traced_as_on_gpu() -> Iterator[None]:
    """Inside the context unpacking writes nothing, and allocates what its kernel does: nothing."""
    token = _IS_TRACED.set(True)
    try:
        yield
    finally:
        _IS_TRACED.reset(token)


def is_traced_as_on_gpu() -> bool:
    """Whether the values that would be unpacked are of no use."""
    return _IS_TRACED.get()
