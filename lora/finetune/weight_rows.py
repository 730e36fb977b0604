"""Rows of a model's parameters, read from its files: no process holds a whole parameter."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lora.decoder.decoder import Decoder
from lora.decoder.quantised.base import base_kind
from lora.errors import ConfigError
from lora.pretrained.hf_weights import map_decoder


class WeightRows:
    """The parameters of the decoder in a folder, by name and rows (`lora.distributed.shards.Rows`).

    Raises ModelError as `load_decoder` does: for tensors that are missing, unexpected, of a wrong
    shape or not floating-point, a damaged file, a tied head that differs from the embedding; and
    ConfigError for a folder in 4 bits, whose codes are not divided by rows.
    """

    def __init__(self, folder: Path) -> None:
        self._mapped = map_decoder(folder)
        if base_kind(self.model) is not None:
            raise ConfigError(
                f"Cannot divide the weights of {folder} among processes: it is in 4 bits already "
                "(bitsandbytes). Use parallel=ddp, in which each process has all of them, or name "
                "the unquantised model."
            )

    @property
    def model(self) -> Decoder:
        """The decoder whose parameters are views of the files; never change them in place."""
        return self._mapped.model

    def release(self) -> None:
        """Give back the memory of what was read."""
        self._mapped.release()

    def __call__(self, name: str, rows: slice) -> Tensor:
        """Return a copy of some rows of the parameter `name`, in the dtype of the file.

        Raises ModelError if a file was cut since.
        """
        for file in self._mapped.files:
            file.check_size()
        # Copied, so that the pages can be given back: a shard then needs its own memory alone.
        read = (
            self.model.get_parameter(name)
            .detach()[rows]
            .clone(memory_format=torch.contiguous_format)
        )
        self.release()
        return read
