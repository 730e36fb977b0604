"""GGUF files, opened and checked: their metadata, and their tensors' values.

Read without the `gguf` package's own reader, which trusts the lengths in a damaged file and makes
an object of every token. Here every length is checked against the file's size before anything is
allocated. Source: the GGUF specification, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora.errors import ModelError
from lora.runs.disk import os_reason

_MAX_TENSORS, _MAX_KEYS, _MAX_ITEMS = 100_000, 10_000, 4_000_000
_MAX_HEADER_BYTES = 256 * 1024 * 1024
_BLOCK_BYTES = 8 * 1024 * 1024  # fp32 bytes of one dequantised block of rows
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """Location, shape and type of one tensor in the file."""

    name: str
    shape: tuple[int, ...]
    """Slowest dimension first, as in torch; the file stores it in reverse."""
    kind: int
    """ggml's number of its type: 0 is F32, 1 is F16, 2 is Q4_0 …"""
    offset_bytes: int
    n_bytes: int


class GGUFFile:
    """An open GGUF file: `metadata` by key, as plain values, and `tensors` by name.

    Raises ModelError for a file that is not GGUF, is truncated, or contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                start = file.read(24)
                _check_start(path, start)
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                # Values are read, not mapped: a file that is cut meanwhile is an error then, where
                # a mapping would end the process, and what was read does not stay in memory.
                self._handle = os.dup(file.fileno())
                weakref.finalize(self, os.close, self._handle)
        except OSError as error:
            raise ModelError(f"Cannot read {path}: {os_reason(error)}.") from None
        reader = _HeaderReader(path, data)
        n_tensors, n_keys = struct.unpack("<QQ", start[8:])
        self.metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = reader.text()
            if key in self.metadata:
                raise reader.fault(f"the key {key!r} occurs twice")
            self.metadata[key] = reader.value()
        n_parts = self.metadata.get("split.count", 1)
        if n_parts != 1:
            raise ModelError(
                f"Cannot load {path}: it is one of {n_parts} parts of a model. Merge them with "
                "llama.cpp's gguf-split --merge, and name the merged file."
            )
        self.tensors = _read_tensors(reader, n_tensors, self._alignment())

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """Yield the values of tensor `name`, dequantised to fp32, in blocks (rows, row length).

        Raises ModelError for a type that cannot be dequantised, or values that are not finite.
        """
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        kind = GGMLQuantizationType(tensor.kind)
        row_length = tensor.shape[-1]
        n_rows = math.prod(tensor.shape[:-1])
        row_bytes = tensor.n_bytes // n_rows
        at_once = rows_per_block(row_length)
        for first in range(0, n_rows, at_once):
            rows = min(at_once, n_rows - first)
            start = tensor.offset_bytes + first * row_bytes
            raw = np.frombuffer(self._read(start, rows * row_bytes), np.uint8)
            try:
                # A flipped bit can make a scale infinite: the check below reports that better.
                with np.errstate(all="ignore"):
                    values = dequantize(raw.reshape(rows, row_bytes), kind)
            except NotImplementedError:
                raise ModelError(
                    f"Cannot load {self.path}: the gguf package cannot dequantise {name}, which is "
                    f"of type {kind.name}. Use a file of another type, such as Q8_0 or Q4_K_M."
                ) from None
            values = values.astype(np.float32, copy=False)
            if not np.isfinite(values).all():
                raise ModelError(f"Cannot load {self.path}: {name} is not finite. Copy it again.")
            yield values  # (rows, row_length)

    def values(self, name: str) -> np.ndarray:
        """Return the values of tensor `name`, fp32, in its shape. Raises as `blocks` does."""
        tensor = self.tensors[name]
        return np.concatenate(list(self.blocks(name))).reshape(tensor.shape)

    def _read(self, start: int, n_bytes: int) -> bytearray:
        raw = bytearray(n_bytes)
        try:
            n_read = os.preadv(self._handle, [raw], start)
        except OSError as error:
            raise ModelError(f"Cannot read {self.path}: {os_reason(error)}.") from error
        if n_read < n_bytes:
            raise ModelError(
                f"Cannot read {self.path}: it became shorter while it was read. Another program "
                "is writing it: try again when that has ended."
            )
        return raw

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", 32)
        if not isinstance(value, int) or not 1 <= value <= 2**20 or value & (value - 1):
            raise ModelError(
                f"Cannot load {self.path}: general.alignment is {value!r}. Copy it again."
            )
        return value


def rows_per_block(row_length: int) -> int:
    """Return how many rows of that length are read, or written, at once."""
    return max(1, _BLOCK_BYTES // (4 * row_length))


def _check_start(path: Path, start: bytes) -> None:
    if len(start) < 24 or start[:4] != b"GGUF":
        raise ModelError(f"Cannot load {path}: it is not a GGUF file: it begins with {start!r}.")
    version, n_tensors, n_keys = struct.unpack("<IQQ", start[4:])
    if version not in (2, 3):
        swapped = struct.unpack(">I", start[4:8])[0] in (2, 3)
        seen = "big-endian" if swapped else f"a GGUF file of version {version}"
        raise ModelError(
            f"Cannot load {path}: it is {seen}. Allowed: little-endian GGUF files of version 2 or "
            "3. Get a newer file, or copy this one again."
        )
    if n_tensors > _MAX_TENSORS or n_keys > _MAX_KEYS:
        claims = f"it claims {n_tensors:,} tensors and {n_keys:,} keys"
        raise ModelError(f"Cannot load {path}: {claims}. Copy it again.")


class _HeaderReader:
    """Reads values of the header one after the other, never beyond the file's end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.offset = path, data, 24
        self.end = min(len(data), _MAX_HEADER_BYTES)

    def fault(self, what: str) -> ModelError:
        return ModelError(
            f"Cannot load {self.path}: near byte {self.offset:,} {what}. Copy it again."
        )

    def take(self, n_bytes: int) -> int:
        """Return the offset, and advance it by `n_bytes`."""
        offset = self.offset
        if n_bytes > self.end - offset:
            raise self.fault(f"a value claims {n_bytes:,} bytes, more than the file has")
        self.offset += n_bytes
        return offset

    def number(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self.data, self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        n_bytes = self.number("Q")
        start = self.take(n_bytes)
        try:
            return self.data[start : start + n_bytes].decode()
        except UnicodeDecodeError:
            raise self.fault("a string is not UTF-8") from None

    def value(self) -> Any:
        kind = self.number("I")
        if kind != _ARRAY:
            return self._scalar(kind)
        kind, n_items = self.number("I"), self.number("Q")
        if n_items > _MAX_ITEMS:
            raise self.fault(f"a list claims {n_items:,} items")
        if kind == _STRING:
            return [self.text() for _ in range(n_items)]
        code = self._code(kind)
        start = self.take(n_items * struct.calcsize(f"<{code}"))
        return list(struct.unpack_from(f"<{n_items}{code}", self.data, start))

    def _scalar(self, kind: int) -> Any:
        return self.text() if kind == _STRING else self.number(self._code(kind))

    def _code(self, kind: int) -> str:
        if kind not in _NUMBERS:
            raise self.fault(f"a value has the unknown type {kind}")
        return _NUMBERS[kind]


def _read_tensors(reader: _HeaderReader, n_tensors: int, alignment: int) -> dict[str, GGUFTensor]:
    heads = [_read_head(reader) for _ in range(n_tensors)]
    base = reader.offset + -reader.offset % alignment
    tensors: dict[str, GGUFTensor] = {}
    end = base
    for name, shape, kind, offset in sorted(heads, key=lambda head: head[3]):
        n_bytes = _size_bytes(reader, name, shape, kind)
        tensor = GGUFTensor(name, shape, kind, base + offset, n_bytes)
        if tensor.offset_bytes < end or offset % alignment or name in tensors:
            raise reader.fault(f"the offset of {name} conflicts with another tensor's")
        end = tensor.offset_bytes + n_bytes
        if end > len(reader.data):
            ends = f"{name} ends at byte {end:,}, the file at {len(reader.data):,}"
            raise ModelError(f"Cannot load {reader.path}: it is truncated: {ends}. Copy it again.")
        tensors[name] = tensor
    return tensors


def _read_head(reader: _HeaderReader) -> tuple[str, tuple[int, ...], int, int]:
    name, n_sizes = reader.text(), reader.number("I")
    if not 1 <= n_sizes <= 4:
        raise reader.fault(f"{name} has {n_sizes} dimensions")
    sizes = tuple(reader.number("Q") for _ in range(n_sizes))
    return name, sizes[::-1], reader.number("I"), reader.number("Q")


def _size_bytes(reader: _HeaderReader, name: str, shape: tuple[int, ...], kind: int) -> int:
    from gguf import GGML_QUANT_SIZES

    known = {int(number): sizes for number, sizes in GGML_QUANT_SIZES.items()}
    if kind not in known:
        raise reader.fault(f"{name} is of the unknown type {kind}")
    values, n_bytes = known[kind]  # of one block
    if not math.prod(shape) or shape[-1] % values:
        raise reader.fault(f"{name} of shape {shape} cannot be of type {kind}")
    return math.prod(shape) // values * n_bytes
