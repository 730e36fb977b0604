"""Blocks of one long text: random ones to learn from, all of them in order to measure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora.errors import DataError

_PAGE_ROWS = 1024


class BlockStream:
    """Endless batches of random blocks: (inputs, targets), both (B, T) int64.

    Row number n of a run depends on the seed and n alone, so neither the batch size nor the split
    into micro-batches changes which rows a run sees, and a resumed run goes on exactly.

    Args:
        tokens: the text, (N,) int64.
        block_size: T; the text must hold at least T + 1 tokens.
        batch_rows: B.
        seed: of the rows' places.
        device: where the batches are put.
    """

    def __init__(
        self, tokens: Tensor, block_size: int, batch_rows: int, seed: int, device: torch.device
    ) -> None:
        check_length(tokens, block_size, "The text to learn from")
        self._tokens, self._device = tokens, device
        self._block_size, self._batch_rows, self._seed = block_size, batch_rows, seed
        self._row = 0
        self._page: tuple[int, np.ndarray[Any, np.dtype[np.int64]]] | None = None

    def __next__(self) -> tuple[Tensor, Tensor]:
        rows = range(self._row, self._row + self._batch_rows)
        starts = torch.tensor([self._start(row) for row in rows])
        self._row += self._batch_rows
        return _cut(self._tokens, starts, self._block_size, self._device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the number of rows given out."""
        return {"row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the row that `state_dict` returned."""
        self._row = int(state["row"])

    def _start(self, row: int) -> int:
        number, place = divmod(row, _PAGE_ROWS)
        if self._page is None or self._page[0] != number:
            draw = np.random.default_rng([self._seed, number])
            most = len(self._tokens) - self._block_size
            self._page = number, draw.integers(0, most, size=_PAGE_ROWS)
        return int(self._page[1][place])


def ordered_blocks(
    tokens: Tensor, block_size: int, batch_rows: int, most_tokens: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield blocks side by side, evenly spread if the text has more than `most_tokens` tokens."""
    check_length(tokens, block_size, "The held-out text")
    starts = torch.arange(0, len(tokens) - block_size, block_size)
    most_rows = max(1, most_tokens // block_size)
    if len(starts) > most_rows:
        starts = starts[torch.linspace(0, len(starts) - 1, most_rows).long()]
    for part in starts.split(batch_rows):
        yield _cut(tokens, part, block_size, device)


def check_length(tokens: Tensor, block_size: int, what: str) -> None:
    """Raise DataError if `tokens` are too few for one block and its targets."""
    if len(tokens) <= block_size:
        raise DataError(
            f"{what} has {len(tokens)} tokens, and one block needs block_size + 1 = "
            f"{block_size + 1}. Give a longer text, or a smaller block size."
        )


def _cut(
    tokens: Tensor, starts: Tensor, block_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    places = starts[:, None] + torch.arange(block_size + 1)  # (B, T + 1)
    rows = tokens[places].to(device)
    return rows[:, :-1], rows[:, 1:]
