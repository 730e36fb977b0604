"""By how much an adapted model's logits change with the values that its base's weights have.

Values of one linear at a time are replaced in a forward pass, so no second model is in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.adapters.merge import default_forward
from lora.runs.progress import StageProgress

PROBE_TOKENS = 32
"""Random tokens for which logits are compared."""
MIN_SHOWN_S = 2.0
"""A pass that has taken this long shows its progress."""

Values = Callable[[str], Tensor]
"""Full name of a linear -> other values (O, I) of its weight."""


@torch.no_grad()
def logits_change(
    model: nn.Module,
    now: Mapping[str, Callable[[], Tensor]],
    others: Values,
    vocab_size: int,
    mine: Values | None = None,
) -> float:
    """Return ‖others' - mine‖ / ‖others'‖ of the logits where linears have other values.

    `now` has, by the full names of these linears, what gives their weights (O, I) as they are;
    `mine` other ones to compare with, if not these.
    """
    ids = probe_ids(model, vocab_size)
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        with nullcontext() if mine is None else _replaced(model, now, mine):
            before = default_forward(model, ids).double()
        with _replaced(model, now, others):
            after = default_forward(model, ids).double()
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]
    return float((after - before).norm() / after.norm().clamp(min=1e-30))


def probe_ids(model: nn.Module, vocab_size: int) -> Tensor:
    """Return the same tokens, (1, T), for every model with this vocabulary."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (1, PROBE_TOKENS), generator=draw)
    return ids.to(next(model.parameters()).device)


@contextmanager
def _replaced(
    model: nn.Module, now: Mapping[str, Callable[[], Tensor]], others: Values
) -> Iterator[None]:
    """Within the block the linears named in `now` add what other weights would have given."""
    with _PassProgress(len(now)) as shown:
        hooks = []
        for name, own in now.items():
            add = partial(_add_difference, partial(others, name), own, shown)
            hooks.append(model.get_submodule(name).register_forward_hook(add))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _add_difference(
    other: Callable[[], Tensor],
    own: Callable[[], Tensor],
    shown: _PassProgress,
    module: nn.Module,
    inputs: tuple[Any, ...],
    output: Tensor,
) -> Tensor:
    shown.tick()
    weight = own()
    wide = torch.promote_types(weight.dtype, torch.float32)
    difference = other().to(weight.device, wide) - weight.to(wide)  # (O, I)
    if inputs[0].is_floating_point():
        change = F.linear(inputs[0].to(wide), difference)
    else:  # the ids that an embedding gets
        change = F.embedding(inputs[0], difference)
    return output + change.to(output.dtype)


class _PassProgress:
    """A bar for a pass through `n_layers` linears, if it takes long."""

    def __init__(self, n_layers: int) -> None:
        self._n_layers, self._n_done = n_layers, 0
        self._bar: StageProgress | None = None

    def __enter__(self) -> _PassProgress:
        self._began_s = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(*error)

    def tick(self) -> None:
        """Called before each linear; one that is called twice counts once more."""
        self._n_done = min(self._n_done + 1, self._n_layers)
        if self._bar is None and time.monotonic() - self._began_s > MIN_SHOWN_S:
            self._bar = StageProgress().__enter__()
        if self._bar is not None:
            self._bar.update("comparing the base's values", self._n_done, self._n_layers)
