"""Linears that their owner never calls, or not always: LoRA on them would be without effect.

A state-space mixer (Mamba and its relatives) hands the weights of some of its linears to a kernel,
on a GPU in training, or multiplies by one itself.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable

from torch import nn

_STATE_MATRIX = "A_log"
"""The parameter that state-space mixers have, under the name that all of them give it."""
_READ = re.compile(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|data)\b)")


def find_uncalled(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return those of the linears `names` whose mixer in `model` reads their weight itself."""
    read: dict[str, frozenset[str]] = {}  # by class
    found = []
    for name in names:
        path, _, own = name.rpartition(".")
        owner = model.get_submodule(path)
        if _STATE_MATRIX in dict(owner.named_parameters(recurse=False)):
            kind = type(owner).__qualname__
            if kind not in read:
                read[kind] = _weights_read(type(owner))
            found += [name] if own in read[kind] else []
    return found


def _weights_read(kind: type[nn.Module]) -> frozenset[str]:
    """Return the names of the children whose weight the methods of `kind` read."""
    methods = (m for name, m in inspect.getmembers(kind, inspect.isfunction) if name != "__init__")
    own = (method for method in methods if method.__module__ == kind.__module__)
    return frozenset(name for method in own for name in _READ.findall(inspect.getsource(method)))
