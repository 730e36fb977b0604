"""Linears whose owner reads the weight instead of calling them, or as well.

LoRA on those that are never called, or not always, would be without effect: a state-space mixer
(Mamba and its relatives) hands the weights of some of its linears to a kernel, on a GPU in
training, or multiplies by one itself. And a weight that anything reads cannot be packed codes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable

from torch import nn

_STATE_MATRIX = "A_log"
"""The parameter that state-space mixers have, under the name that all of them give it."""
_READ = re.compile(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|data)\b)")
_ANY_READ = re.compile(r"\b(\w+)((?:\.\w+|\[[^\]\n]*\])+)\.weight\b(?!\.device\b)")
"""A weight of something's part, its shape and dtype too, which those of codes are not."""
_INDEX = re.compile(r"\[[^\]]*\]|\.\d+(?=\.|$)")
_SPLIT_MODE = "slow_but_exact"
"""Bloom's setting for weights that were trained in several parts: off, its code calls linears."""


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


def find_weights_read(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return those of the linears `names` whose weight the code of transformers in `model` reads.

    By its source, of whatever owner: also a weight that it only asks for a dtype or a shape.
    """
    plain = {name: _INDEX.sub("", name) for name in names}
    found: set[str] = set()
    read: dict[type, frozenset[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        kind = type(module)
        if kind not in read:
            read[kind] = _paths_read(kind)
        if vars(module).get(_SPLIT_MODE) is False or not read[kind]:
            continue
        start = f"{path}." if path else ""
        below = {name: plain[name] for name in plain if name.startswith(start)}
        for who, part in read[kind]:
            exact = _INDEX.sub("", f"{start}{part}")
            found |= {
                name
                for name, without in below.items()
                if (without == exact if who == "self" else without.endswith(f".{part}"))
            }
    return [name for name in plain if name in found]


def _weights_read(kind: type[nn.Module]) -> frozenset[str]:
    """Return the names of the children whose weight the methods of `kind` read."""
    methods = (m for name, m in inspect.getmembers(kind, inspect.isfunction) if name != "__init__")
    own = (method for method in methods if method.__module__ == kind.__module__)
    return frozenset(name for method in own for name in _READ.findall(inspect.getsource(method)))


def _paths_read(kind: type) -> frozenset[tuple[str, str]]:
    """Return whose weights the methods of `kind` read: (variable, path of the part below it)."""
    found = set()
    for owner in kind.__mro__:
        if not owner.__module__.startswith("transformers.models."):
            continue
        for name, method in vars(owner).items():
            if inspect.isfunction(method) and not name.startswith(("__init__", "_init_")):
                source = inspect.getsource(inspect.unwrap(method))
                found |= {
                    (who, _INDEX.sub("", path)[1:]) for who, path in _ANY_READ.findall(source)
                }
    return frozenset(found)
