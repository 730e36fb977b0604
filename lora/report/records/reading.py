"""Values out of JSON files that may be damaged: what is wrong is gathered, with the file's name."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora.errors import LoraError
from lora.runs.disk import read_json, read_rows

Faults = list[str]
_MAX_HEADER_BYTES = 100_000_000
"""As the safetensors format allows."""


@dataclass(frozen=True)
class Values:
    """An object of a JSON file. What is absent or null is None; what is of another kind a fault."""

    values: dict[str, Any]
    where: str
    """The file, and the place in it."""
    faults: Faults

    def section(self, name: str) -> Values:
        """Return the object `name`, empty if it is absent."""
        return Values(
            self._get(name, dict, "an object") or {}, f"{self.where}: {name}", self.faults
        )

    def items(self, name: str) -> Iterator[Values]:
        """Yield the objects of the list `name`."""
        for number, value in enumerate(self._get(name, list, "a list") or (), start=1):
            where = f"{self.where}: {name}, number {number}"
            if isinstance(value, dict):
                yield Values(value, where, self.faults)
            else:
                self.faults.append(f"{where} is {value!r:.40}, not an object")

    def number(self, name: str) -> float | None:
        """Return a finite number; one that is not finite is None."""
        value = self._get(name, (int, float), "a number")
        return float(value) if value is not None and math.isfinite(value) else None

    def count(self, name: str) -> int | None:
        """Return a number without a fraction."""
        value = self.number(name)
        if value is not None and value != int(value):
            self.faults.append(f"{self.where}: {name} is {value!r}, not a whole number")
            return None
        return None if value is None else int(value)

    def text(self, name: str) -> str | None:
        """Return a text."""
        value: str | None = self._get(name, str, "a text")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a list of texts."""
        found = self._get(name, list, "a list") or ()
        return tuple(str(value) for value in found)

    def flag(self, name: str) -> bool:
        """Return whether `name` is true."""
        return bool(self._get(name, bool, "true or false"))

    def _get(self, name: str, kind: type | tuple[type, ...], called: str) -> Any:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.faults.append(f"{self.where}: {name} is {value!r:.40}, not {called}")
            return None
        return value


def read_object(path: Path, faults: Faults, *, required: bool = False) -> Values:
    """Return the object that a JSON file holds; empty if there is no file and none is required."""
    found: Any = {}
    if required or path.is_file():
        try:
            found = read_json(path)
        except LoraError as error:
            faults.append(str(error))
    if not isinstance(found, dict):
        faults.append(f"{path} holds {found!r:.40}, not an object")
        found = {}
    return Values(found, str(path), faults)


def read_lines(path: Path, faults: Faults) -> list[Values]:
    """Return the objects of a JSON-lines file in the order of their steps; none if it is absent."""
    if not path.is_file():
        return []
    try:
        rows = read_rows(path)
    except LoraError as error:
        faults.append(str(error))
        return []
    lines = [Values(row, f"{path}, line {n}", faults) for n, row in enumerate(rows, start=1)]
    kept = [line for line in lines if line.count("step") is not None]
    return sorted(kept, key=lambda line: line.count("step") or 0)


def count_elements(path: Path, faults: Faults) -> int | None:
    """Return how many values the tensors of a safetensors file have, from its header alone."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, _MAX_HEADER_BYTES)))
        shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
        return sum(math.prod(shape) for shape in shapes)
    except OSError as error:
        faults.append(f"{path} cannot be read: {error.strerror}.")
    except (ValueError, TypeError, KeyError, AttributeError, struct.error, RecursionError):
        faults.append(f"{path} is no safetensors file.")
    return None


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested objects by dotted name."""
    if not isinstance(value, dict) or not value:
        return {prefix: value} if prefix else {}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def relative(folder: Path, base: Path) -> str:
    """Return where `folder` lies, seen from `base`."""
    return os.path.relpath(folder.resolve(), base.resolve())
