"""Fixed-length blocks of one long text: drawn at random to train, all in order to evaluate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora.errors import DataError

_PAGE_BLOCKS = 1024  # start offsets are drawn by the page: one generator per block would be slow


class BlockStream:
    """Endless batches of random blocks: (inputs, targets), both (B, T) int64.

    The n-th block of a run depends on the seed and n alone, so neither the batch size nor the split
    into micro-batches changes which blocks a run sees, and a resumed run continues exactly.

    Args:
        tokens: the text, (N,) int64.
        block_size: T; the text must hold at least T + 1 tokens.
        batch_size: B.
        seed: of the blocks' start offsets.
        device: of the batches.
    """

    def __init__(
        self, tokens: Tensor, block_size: int, batch_size: int, seed: int, device: torch.device
    ) -> None:
        check_length(tokens, block_size, "the training text")
        self._tokens, self._device = tokens, device
        self._block_size, self._batch_size, self._seed = block_size, batch_size, seed
        self._n_drawn = 0
        self._page: tuple[int, np.ndarray[Any, np.dtype[np.int64]]] | None = None

    def __next__(self) -> tuple[Tensor, Tensor]:
        draws = range(self._n_drawn, self._n_drawn + self._batch_size)
        starts = torch.tensor([self._start(draw) for draw in draws])
        self._n_drawn += self._batch_size
        return _cut(self._tokens, starts, self._block_size, self._device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the number of blocks drawn; "row" is the key in the checkpoints on disk."""
        return {"row": self._n_drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the block that `state_dict` named."""
        self._n_drawn = int(state["row"])

    def _start(self, draw: int) -> int:
        number, index = divmod(draw, _PAGE_BLOCKS)
        if self._page is None or self._page[0] != number:
            generator = np.random.default_rng([self._seed, number])
            n_starts = len(self._tokens) - self._block_size
            self._page = number, generator.integers(0, n_starts, size=_PAGE_BLOCKS)
        return int(self._page[1][index])


def ordered_blocks(
    tokens: Tensor, block_size: int, batch_size: int, max_tokens: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield consecutive blocks, or evenly spaced ones if the text has more than `max_tokens`."""
    check_length(tokens, block_size, "the validation text")
    starts = torch.arange(0, len(tokens) - block_size, block_size)
    max_blocks = max(1, max_tokens // block_size)
    if len(starts) > max_blocks:
        starts = starts[torch.linspace(0, len(starts) - 1, max_blocks).long()]
    for part in starts.split(batch_size):
        yield _cut(tokens, part, block_size, device)


def check_length(tokens: Tensor, block_size: int, what: str) -> None:
    """Raise DataError if `tokens` are too few for one block and its targets."""
    if len(tokens) <= block_size:
        raise DataError(
            f"Cannot cut a block out of {what}: it has {len(tokens)} tokens. A block needs "
            f"block_size + 1 = {block_size + 1}. Give a longer text, or a smaller block size."
        )


def _cut(
    tokens: Tensor, starts: Tensor, block_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    indices = starts[:, None] + torch.arange(block_size + 1)  # (B, T + 1)
    blocks = tokens[indices].to(device)  # (B, T + 1)
    return blocks[:, :-1], blocks[:, 1:]
