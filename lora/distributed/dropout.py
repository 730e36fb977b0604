"""Dropout in processes with parts of one micro-batch: the masks that one process would draw.

Each process draws the masks of the whole micro-batch and keeps the rows of its part, so that their
generators stay alike, and a run has the same masks with any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.device import Share


class SharedDropouts:
    """All dropout modules of a model, which `drawn_together` replaces for a while.

    Args:
        model: with or without dropout.
        share: this process's part.
        n_sequences: of the whole micro-batch.
        seed: of the masks of inputs that have no sequences: of experts, which get tokens.
    """

    def __init__(self, model: nn.Module, share: Share, n_sequences: int, seed: int) -> None:
        self._share, self._n_sequences, self._seed = share, n_sequences, seed
        self._found = [
            (parent, name, module)
            for parent in model.modules()
            for name, module in parent.named_children()
            if isinstance(module, nn.Dropout) and module.p > 0
        ]
        self._generator: torch.Generator | None = None

    @contextmanager
    def drawn_together(self, number: int) -> Iterator[None]:
        """Inside the context masks are those of the whole micro-batch.

        `number` is that of the step, or of what else draws in it: masks of inputs without sequences
        are of its seed.
        """
        if not self._found or self._share.size == 1:
            yield
            return
        self._generator, own_seed = None, self._own_seed(number)
        for parent, name, module in self._found:
            setattr(parent, name, _SharedDropout(module, self, own_seed))
        try:
            yield
        finally:
            for parent, name, module in self._found:
                setattr(parent, name, module)

    def mask(self, x: Tensor, p: float, own_seed: int) -> Tensor:
        """Return the factors of `x` (B, …), 0 or 1 / (1 − p), for this process's sequences."""
        if len(x) != self._share.largest(self._n_sequences):
            return self._own_mask(x, p, own_seed)
        ones = torch.ones(self._n_sequences, *x.shape[1:], dtype=x.dtype, device=x.device)
        mask = F.dropout(ones, p)[self._share.part(self._n_sequences)]
        padding = mask.new_zeros(len(x) - len(mask), *mask.shape[1:])
        return torch.cat((mask, padding)) if len(padding) else mask

    def _own_mask(self, x: Tensor, p: float, own_seed: int) -> Tensor:
        """Return a mask that this process draws alone: how often it does differs between them."""
        if self._generator is None:
            self._generator = torch.Generator(x.device).manual_seed(own_seed)
        keeps = torch.full_like(x, 1 - p).bernoulli(generator=self._generator)
        return keeps / (1 - p)

    def _own_seed(self, number: int) -> int:
        return (self._seed * 1_000_003 + number) * 1_009 + self._share.rank


class _SharedDropout(nn.Module):
    """Stands in for one dropout module."""

    def __init__(self, module: nn.Dropout, owner: SharedDropouts, own_seed: int) -> None:
        super().__init__()
        self.train(module.training)
        self._p, self._owner, self._own_seed = module.p, owner, own_seed

    def forward(self, x: Tensor) -> Tensor:
        return x * self._owner.mask(x, self._p, self._own_seed) if self.training else x
