"""Prompts dealt to several processes, and their answers back in the order of the prompts.

The i-th prompt is answered by rank i mod N, with the seed that it has in one process. So the
answers are those of one process, up to the rounding of batches of other sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from lora.config import SamplingConfig
from lora.decoder.language_model import LanguageModel
from lora.distributed.start import joined
from lora.distributed.world import ALONE, World
from lora.inference.generate import check_prompts, generate

T = TypeVar("T")


@contextmanager
def sharing(device: torch.device) -> Iterator[World]:
    """Within the block the processes that torchrun has started share what is asked of a model.

    `device` is the model's. Processes that train together at the time do not: a callback runs in
    one of them, and the others would never come.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        yield ALONE
        return
    with joined(device) as world:
        yield world


def generate_shared(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    world: World,
    *,
    stop_ids: Sequence[int] = (),
) -> list[list[int]]:
    """Return what `generate` does, in every process; each of them answers a part of the prompts."""
    check_prompts(prompts, model.config.vocab_size)  # all of them, so that all processes refuse
    own = dealt(len(prompts), world)
    asked = [prompts[index] for index in own]
    answers = generate(model, asked, sampling, stop_ids=stop_ids, numbers=own)
    return in_order(world.gather(answers, "the answers of all processes"))


def dealt(n_items: int, world: World) -> range:
    """Return the indices of the items that this process gets: in turn, as cards are dealt."""
    return range(world.rank, n_items, world.size)


def in_order(parts: Sequence[Sequence[T]]) -> list[T]:
    """Return the items that were dealt, which the parts have by rank, in their order."""
    n_items = sum(map(len, parts))
    return [parts[index % len(parts)][index // len(parts)] for index in range(n_items)]
