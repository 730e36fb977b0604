"""Write a safetensors file tensor by tensor, without a second copy of all tensors in memory.

The format: eight bytes with the header's length, a JSON header with dtype, shape and offsets of
each tensor, then the values. See https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK_BYTES = 2**20
_ALIGNMENT_BYTES = 8


@dataclass(frozen=True)
class Digest:
    """Size and hash of a file, as a checkpoint's manifest holds them."""

    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class TensorParts:
    """A tensor that need not be in memory as a whole."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[Tensor]]
    """Yields its values in order, each part of `dtype`."""


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor | TensorParts],
    metadata: Mapping[str, str] | None = None,
) -> Digest:
    """Write `tensors` to `path` as safetensors; return once they are on the disk.

    Tensors on a GPU are copied to the host one at a time. The bytes depend on the content alone.
    Raises OSError if the disk refuses, and leaves a partial file then.
    """
    return write_tensor_parts(path, {name: _whole(t) for name, t in tensors.items()}, metadata)


def _whole(tensor: Tensor | TensorParts) -> TensorParts:
    if isinstance(tensor, TensorParts):
        return tensor
    return TensorParts(tensor.dtype, tuple(tensor.shape), lambda: iter((tensor,)))


def write_tensor_parts(
    path: Path, tensors: Mapping[str, TensorParts], metadata: Mapping[str, str] | None = None
) -> Digest:
    """Write `tensors` as `write_tensors` does; no more than one part is in memory."""
    # Wide dtypes first, so that every tensor starts at a multiple of its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    digest, n_bytes = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in _pieces(tensors, names, metadata):
            file.write(piece)
            digest.update(piece)
            n_bytes += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return Digest(n_bytes, digest.hexdigest())


def digest_file(path: Path) -> Digest:
    """Return the size and the SHA-256 of a file, without loading it whole."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_CHUNK_BYTES):
            digest.update(part)
        return Digest(file.tell(), digest.hexdigest())


def _pieces(
    tensors: Mapping[str, TensorParts], names: list[str], metadata: Mapping[str, str] | None
) -> Iterator[memoryview]:
    yield memoryview(_header(tensors, names, metadata))
    for name in names:
        for part in tensors[name].parts():
            flat = part.detach().cpu().contiguous().reshape(-1)
            yield memoryview(flat.view(torch.uint8).numpy().data)  # as bytes: NumPy has no bfloat16


def _header(
    tensors: Mapping[str, TensorParts], names: list[str], metadata: Mapping[str, str] | None
) -> bytes:
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    start = 0
    for name in names:
        kind, shape = tensors[name].dtype, tensors[name].shape
        end = start + math.prod(shape) * kind.itemsize
        offsets = [start, end]
        entries[name] = {"dtype": _KINDS[kind], "shape": list(shape), "data_offsets": offsets}
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)  # so that the values are aligned too
    return struct.pack("<Q", len(text)) + text
