"""What one model's steps hold by their size: each size is traced once, others are estimated."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Protocol

import torch

from lora.decoder.language_model import LanguageModel
from lora.fast.memory.trace import StepMemory, StepTracer
from lora.pretrained.transformers_models.small_copy import REFUSALS

_TRACED: dict[tuple[str, int, int, bool], StepMemory] = {}
"""Of this process, by model, tokens, sequences and whether they learn: a sweep's next wave, a trial
of a comparison and a resumed run plan what was planned before."""


FEW_TOKENS = 16, 32
"""Of a sequence, from which longer ones are estimated where a model goes token by token."""
MAX_MORE_OPERATIONS = 1.3
"""Times as many for twice the tokens: in a loop over tokens there are nearly twice as many."""


class Traced(Protocol):
    """What a step of this many sequences holds, traced or estimated."""

    def __call__(self, size: int, *, learns: bool = True) -> StepMemory: ...


class StepTraces:
    """The traces of a model's steps over sequences of `tokens` tokens, by their number.

    Changes `model` in place at the first trace, as StepTracer does, whose arguments these are.
    `about` says what `model` is: models of the same words hold the same; None: it is not known.
    `fallback` is called with a size and whether it learns where the model's code needs values,
    which fake tensors do not have; None: it does not. `may_loop`: whether it may go through a
    sequence token by token.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokens: int,
        *,
        compute_dtype: torch.dtype,
        packed: bool,
        learned_fraction: float,
        captured: bool = False,
        on_gpu: bool = False,
        holds_gradients: bool = True,
        about: str | None = None,
        fallback: Callable[[int, bool], StepMemory] | None = None,
        may_loop: bool = False,
    ) -> None:
        kind = compute_dtype, packed, learned_fraction, captured, on_gpu, holds_gradients
        self._about = None if about is None else f"{about} {kind}"
        self._model, self._tokens, self._compute_dtype = model, tokens, compute_dtype
        self._captured, self._holds_gradients = captured, holds_gradients
        self._on_gpu = on_gpu
        self._fallback, self._may_loop = fallback, may_loop
        self._packed, self._learned_fraction = packed, learned_fraction
        self._traces: dict[tuple[int, bool], StepMemory] = {}

    @cached_property
    def _tracer(self) -> StepTracer:
        return StepTracer(
            self._model,
            compute_dtype=self._compute_dtype,
            captured=self._captured,
            on_gpu=self._on_gpu,
            holds_gradients=self._holds_gradients,
        )

    @property
    def largest_size(self) -> int:
        """Of those that were traced."""
        return max(size for size, _ in self._traces)

    def trace(self, size: int, *, learns: bool = True) -> StepMemory:
        """Return what a step of `size` sequences holds; without `learns`, a validation pass."""
        if (size, learns) not in self._traces:
            self._traces[size, learns] = self._known_or_traced(size, learns=learns)
        return self._traces[size, learns]

    def _known_or_traced(self, size: int, *, learns: bool) -> StepMemory:
        key = None if self._about is None else (self._about, self._tokens, size, learns)
        if key in _TRACED:
            return _TRACED[key]
        found = self._trace(size, learns=learns)
        if key is not None:
            _TRACED[key] = found
        return found

    def _trace(self, size: int, *, learns: bool) -> StepMemory:
        if self._fallback is None:
            return self._traced(size, self._tokens, learns=learns)
        try:
            if self._loops_over_tokens:
                few, more = (self._traced(size, n, learns=learns) for n in FEW_TOKENS)
                start, end = FEW_TOKENS
                return _on_line(few, more, (self._tokens - start) / (end - start))
            return self._traced(size, self._tokens, learns=learns)
        except REFUSALS:
            self._loops_over_tokens = False
            return self._fallback(size, learns)

    def _traced(self, size: int, tokens: int, *, learns: bool) -> StepMemory:
        return self._tracer.trace(
            size,
            tokens,
            packed=self._packed,
            learned_fraction=self._learned_fraction,
            learns=learns,
        )

    @cached_property
    def _loops_over_tokens(self) -> bool:
        """Whether the model goes through a sequence token by token, which takes long to trace."""
        if not self._may_loop or self._tokens <= FEW_TOKENS[1]:
            return False
        counts = []
        for tokens in FEW_TOKENS:
            self._traced(1, tokens, learns=True)
            counts.append(self._tracer.n_operations)
        return counts[1] > MAX_MORE_OPERATIONS * counts[0]

    def estimate(self, size: int, *, learns: bool = True) -> StepMemory:
        """Return what `trace` would, on the line through the nearest two sizes that were traced.

        A step holds as much as the fullest of its moments, each of which grows in a straight line.
        """
        known = {at: held for (at, kind), held in self._traces.items() if kind is learns}
        if size in known:
            return known[size]
        below, above = (sorted(x for x in known if (x < size) is side) for side in (True, False))
        start, end = [*below[-1:], *above[:1]] if below and above else (below[-2:] or above[:2])
        fraction = (size - start) / (end - start)
        return _on_line(known[start], known[end], fraction)


def _on_line(start: StepMemory, end: StepMemory, fraction: float) -> StepMemory:
    """Return what lies on the line from `start` to `end`, or beyond it."""
    parts = zip(vars(start).values(), vars(end).values(), strict=True)
    return StepMemory(*(max(0, round(a + fraction * (b - a))) for a, b in parts))


def largest_that_fits(fits: Callable[[int], bool], lowest: int, too_large: int | None) -> int:
    """Return the largest size in `lowest` … `too_large` − 1 that fits; `lowest` is taken to."""
    reach = 1
    while too_large is None:
        if fits(lowest + reach):
            lowest, reach = lowest + reach, 2 * reach
        else:
            too_large = lowest + reach
    while too_large - lowest > 1:
        middle = (lowest + too_large) // 2
        lowest, too_large = (middle, too_large) if fits(middle) else (lowest, middle)
    return lowest
