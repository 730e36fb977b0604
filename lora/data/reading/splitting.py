"""The split into training and validation examples; equal examples fall on the same side."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from lora.config import DataConfig
from lora.data.reading.formats import Example
from lora.errors import DataError

_FILE_CHARACTERS_FOR_AN_EXAMPLE = 2000
_SEARCHED_CHARACTERS = 100_000


def settings_of_split(config: DataConfig) -> list[str]:
    """Return what was given for the split, as `name=value`: needless where nothing is split off."""
    default, own = vars(DataConfig()), vars(config)
    names = ("eval_fraction", "max_eval_examples")
    return [f"{name}={own[name]!r}" for name in names if own[name] not in (default[name], 0)]


def split_examples(
    examples: Sequence[Example], eval_fraction: float, max_eval: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Return the training and the validation examples, each in the given order.

    Equal examples always fall on the same side, and each side has at least one. Of whole text files
    the ends become validation data, cut between lines, at most `max_eval` times 2000 characters in
    total.

    Args:
        examples: of any formats.
        eval_fraction: fraction of the examples, or of each file's characters; 0: no validation.
        max_eval: maximum number of validation examples.
        seed: of the choice.

    Raises:
        DataError: a split is wanted and there are no two different examples.
    """
    if eval_fraction == 0:
        return list(examples), []
    files = [e for e in examples if e.is_file]
    if len(files) == len(examples):
        return _split_files(files, eval_fraction, max_eval)
    groups: dict[bytes, list[int]] = {}
    for number, example in enumerate(examples):
        groups.setdefault(example.content_key(), []).append(number)
    if len(groups) < 2:
        raise DataError(
            f"Cannot hold out a fraction of {eval_fraction:g} for validation: there are no two "
            f"different examples among {len(examples)}. Give more, or set eval_fraction to 0."
        )
    wanted = min(max_eval, max(1, round(eval_fraction * len(examples))))
    validation = _choose(list(groups.values()), wanted, seed)
    train = [e for number, e in enumerate(examples) if number not in validation]
    return train, [e for number, e in enumerate(examples) if number in validation]


def _choose(groups: list[list[int]], wanted: int, seed: int) -> set[int]:
    """Return about `wanted` indices, of whole groups; at least one group is not chosen."""
    chosen: set[int] = set()
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    for index in order[:-1]:
        if len(chosen) + len(groups[index]) <= wanted:
            chosen.update(groups[index])
    smallest: list[int] = min(groups, key=len)
    return chosen or set(smallest)


def _split_files(
    files: list[Example], eval_fraction: float, max_eval: int
) -> tuple[list[Example], list[Example]]:
    texts = [example.text or "" for example in files]
    total = sum(map(len, texts))
    max_characters = max_eval * _FILE_CHARACTERS_FOR_AN_EXAMPLE
    fraction = min(eval_fraction, max_characters / total)
    train, validation = [], []
    for example, text in zip(files, texts, strict=True):
        border = _border_near(text, round(len(text) * (1 - fraction)))
        if border is None:
            train.append(example)
            continue
        train.append(dataclasses.replace(example, text=text[:border]))
        validation.append(dataclasses.replace(example, text=text[border:]))
    if not validation:
        raise DataError(
            f"Cannot hold out the ends of {len(files)} text files for validation: they are too "
            "short to cut between words. Give longer texts, or set eval_fraction to 0."
        )
    return train, validation


def _border_near(text: str, offset: int) -> int | None:
    """Return the start of a line, or of a word, near `offset`; None if a side would be empty."""
    for pattern in (r"\n+(?=\S)", r"\s+(?=\S)"):
        after = re.compile(pattern).search(text, offset)
        borders = [after.end()] if after else []
        near = max(0, offset - _SEARCHED_CHARACTERS)
        before = [near + m.end() for m in re.finditer(pattern, text[near:offset])]
        for border in borders + before[-1:]:
            if text[:border].strip() and text[border:].strip():
                return border
    return None
