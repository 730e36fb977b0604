"""Cosines and sines of the rotary embedding: computed once a run, looked up once a step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lora.decoder.config import RopeConfig
from lora.decoder.rope import Rope
from lora.kernels.step.attention import find_begins, find_ends
from lora.kernels.step.rotary import RotaryTables


class RopeTables:
    """Tables of all positions of a sequence, for each kind of rotation of a model.

    Args:
        ropes: the kinds of rotation.
        tokens: of a sequence, T.
        dtype: of the tables, fp32 or wider.
        device: where they are.
    """

    def __init__(
        self,
        ropes: Mapping[RopeConfig, Rope],
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.tokens = tokens
        positions = torch.arange(tokens, device=device)[None]  # (1, T)
        self._all = {config: self._halves(rope, positions, dtype) for config, rope in ropes.items()}

    def _halves(self, rope: Rope, positions: Tensor, dtype: torch.dtype) -> RotaryTables:
        cos, sin = rope.tables(positions, dtype)  # (1, T, 1, R)
        if self._has_long(rope.config):
            # Rows of short documents, then those of long ones.
            short = rope.tables(positions, dtype, torch.ones_like(positions))
            cos, sin = (torch.cat(pair, 1) for pair in zip(short, (cos, sin), strict=True))
        # The kernels take half tables: both halves are alike, but for the sine's sign.
        half = cos.shape[-1] // 2
        return cos[0, :, 0, :half].contiguous(), sin[0, :, 0, half:].contiguous()  # (T, R/2)

    def _has_long(self, config: RopeConfig) -> bool:
        """Whether documents of such sequences can be so long that they rotate otherwise."""
        is_short = self.tokens <= config.original_max_position_embeddings
        return config.rope_type == "longrope" and not is_short

    def look_up(self, position_ids: Tensor) -> dict[RopeConfig, RotaryTables]:
        """Return cosine and sine for `position_ids` (N,), (N, R/2) each, by kind of rotation."""
        tables = {}
        for config, (cos, sin) in self._all.items():
            rows = position_ids
            if self._has_long(config):
                begins = find_begins(position_ids)
                is_long = find_ends(begins) - begins > config.original_max_position_embeddings
                rows = rows + self.tokens * is_long  # (N,)
            tables[config] = cos.index_select(0, rows), sin.index_select(0, rows)
        return tables
