"""Rows of a model's parameters, read from its files: no process holds a whole parameter."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lora.decoder.decoder import Decoder
from lora.pretrained.hf_weights import map_decoder


class WeightRows:
    """The parameters of the decoder in a folder, by name and rows (`lora.distributed.shards.Rows`).

    Raises ModelError as `load_decoder` does: for tensors that are missing, unexpected, of a wrong
    shape or not floating-point, a damaged file, a tied head that differs from the embedding.
    """

    def __init__(self, folder: Path) -> None:
        self._mapped = map_decoder(folder)

    @property
    def model(self) -> Decoder:
        """The decoder whose parameters are views of the files; never change them in place."""
        return self._mapped.model

    def release(self) -> None:
        """Give back the memory of what was read."""
        self._mapped.release()

    def __call__(self, name: str, rows: slice) -> Tensor:
        """Return a copy of some rows of the parameter `name`, in the dtype of the file.

        Of a weight in 4 bits they are rows of codes, and its scales have names too. Raises
        ModelError if a file was cut since.
        """
        for file in self._mapped.files:
            file.check_size()
        # Copied, so that the pages can be given back: a shard then needs its own memory alone.
        owner, _, key = name.rpartition(".")
        buffers = dict(self.model.get_submodule(owner).named_buffers(recurse=False))
        stored = buffers[key] if key in buffers else self.model.get_parameter(name).detach()
        read = (stored[rows] if stored.dim() else stored).clone(
            memory_format=torch.contiguous_format
        )
        self.release()
        return read
