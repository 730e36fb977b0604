"""Safetensors files mapped so that what was read can be given back: a pass needs no more memory.

A tensor of the safetensors library keeps the pages that were touched in the process's memory.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora.decoder.language_model import LanguageModel
from lora.errors import ModelError
from lora.pretrained.hf_files import check_size

_KINDS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I8": torch.int8,
}


class MappedFile:
    """A safetensors file that the library has checked; its tensors are views of one mapping."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            (n_header,) = struct.unpack("<Q", file.read(8))
            self._header = json.loads(file.read(n_header))
            self._start = 8 + n_header
            # Private: tensors may be written to in torch's eyes, the file never is.
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        ends = [entry["data_offsets"][1] for n, entry in self._header.items() if n[:2] != "__"]
        if self._start + max(ends, default=0) > len(self._data):
            raise ModelError(f"Cannot read {path}: it became shorter. Copy it again.")

    def tensor(self, name: str) -> Tensor:
        """Return a view of the tensor `name`; never change it in place."""
        entry = self._header[name]
        kind, shape = _KINDS[entry["dtype"]], entry["shape"]
        start = self._start + entry["data_offsets"][0]
        values = math.prod(shape)
        if values == 0:
            return torch.empty(shape, dtype=kind)
        if start % kind.itemsize:  # torch needs aligned values
            raw = bytearray(self._data[start : start + values * kind.itemsize])
            return torch.frombuffer(raw, dtype=kind).reshape(shape)
        return torch.frombuffer(self._data, dtype=kind, count=values, offset=start).reshape(shape)

    def check_size(self) -> None:
        """Raise ModelError if the file was cut since: reading it would end the process."""
        check_size(self.path, len(self._data))

    def release(self) -> None:
        """Give the memory of what was read back; it is read again when it is needed."""
        self._data.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class MappedModel:
    """A model in the dtypes of its files, to merge or to export: never change it in place."""

    model: LanguageModel
    files: tuple[MappedFile, ...] = ()
    """Those that its parameters are views of; none where it is in memory."""

    def release(self) -> None:
        """Give back the memory of the pages that were read; the model stays as it is."""
        for file in self.files:
            file.release()
