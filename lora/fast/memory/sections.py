"""The peak of a deep model's step from a trace of a few of its blocks.

Blocks of one kind allocate and free alike, so a trace needs the first and the last block and one of
each kind between them. It is cut into sections at the boundaries of blocks, and a section is
repeated for every block that it stands for.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from lora.decoder.language_model import LanguageModel

Label = tuple[str, int]
"""Of a section: before, forward of block i, head, backward of block i, or after."""
BEFORE, HEAD, AFTER = ("before", 0), ("head", 0), ("after", 0)


class Bytes(NamedTuple):
    """Live bytes by the phase that allocated them."""

    forward: int = 0
    loss: int = 0
    backward: int = 0
    gradients: int = 0
    """Of what trains; in `backward` or `loss` too."""

    @property
    def total(self) -> int:
        """All of them, gradients once."""
        return self.forward + self.loss + self.backward

    def plus(self, later: Bytes, earlier: Bytes) -> Bytes:
        """Return these with what was added between `earlier` and `later`."""
        return Bytes(*(a + b - c for a, b, c in zip(self, later, earlier, strict=True)))


NOTHING = Bytes()


@dataclass
class Section:
    """What a part of a step held when it began, at its fullest moment, and when it ended."""

    start: Bytes
    peak: Bytes | None = None
    """None where nothing was allocated."""
    end: Bytes = NOTHING


def block_kinds(
    blocks: nn.ModuleList, model: LanguageModel, settings: Sequence[Hashable]
) -> list[Hashable]:
    """Return a kind for each block: those of one kind hold the same memory in a step.

    The kind is of the block's modules, tensors and `settings` (such as its window), and of whether
    a gradient goes through its input: autograd saves nothing of blocks before the first that
    trains.
    """
    kinds: list[Hashable] = []
    has_gradient = any(p.requires_grad for p in model.get_input_embeddings().parameters())
    for block, own in zip(blocks, settings, strict=True):
        modules = tuple((name, type(m), m.extra_repr()) for name, m in block.named_modules())
        tensors = tuple(
            (name, t.shape, t.dtype, t.requires_grad)
            for name, t in (*block.named_parameters(), *block.named_buffers())
        )
        kinds.append((own, has_gradient, modules, tensors))
        has_gradient = has_gradient or any(p.requires_grad for p in block.parameters())
    return kinds


def representatives(kinds: Sequence[Hashable]) -> list[int]:
    """Return for each block the index of the one that stands for it: first and last themselves."""
    last = len(kinds) - 1
    first_of: dict[Hashable, int] = {}
    for index in range(1, last):
        first_of.setdefault(kinds[index], index)
    return [i if i in (0, last) else first_of[kinds[i]] for i in range(len(kinds))]


def retain_blocks(blocks: nn.ModuleList, indices: Sequence[int]) -> None:
    """Changes `blocks` in place: only those at `indices` stay."""
    retained = [blocks[i] for i in indices]
    del blocks[:]
    blocks.extend(retained)


def peak_of(sections: Mapping[Label, Section], stands_for: Sequence[int]) -> Bytes:
    """Return the fullest moment of a step whose block i is as the traced block `stands_for[i]`."""
    now, peak = NOTHING, NOTHING
    for label in _in_order(stands_for):
        section = sections.get(label)
        if section is None:  # the backward pass of a block before the first that trains
            continue
        if section.peak is not None:
            then = now.plus(section.peak, section.start)
            if then.total >= peak.total:
                peak = then
        now = now.plus(section.end, section.start)
    return peak


def _in_order(stands_for: Sequence[int]) -> Iterator[Label]:
    yield BEFORE
    for traced in stands_for:
        yield "forward", traced
    yield HEAD
    for traced in reversed(stands_for):
        yield "backward", traced
    yield AFTER
