"""Helpers that read run directories for the report: tensor counts, dotted names, paths."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

from lora.runs.disk import os_reason
from lora.runs.typed_json import Faults

_MAX_HEADER_BYTES = 100_000_000
"""As the safetensors format allows."""


def count_elements(path: Path, faults: Faults) -> int | None:
    """Return the number of elements of all tensors of a safetensors file, from its header alone."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, _MAX_HEADER_BYTES)))
        shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
        return sum(math.prod(shape) for shape in shapes)
    except OSError as error:
        faults.append(f"Cannot read {path}: {os_reason(error)}.")
    except (ValueError, TypeError, KeyError, AttributeError, struct.error, RecursionError):
        faults.append(f"{path} is not a safetensors file.")
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
    """Return the path of `folder` relative to `base`."""
    return os.path.relpath(folder.resolve(), base.resolve())
