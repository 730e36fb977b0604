"""What a user should know of encoded examples, in training and in evaluation alike."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from lora.data.reading.formats import COMPLETION, Example
from lora.data.sequences.encoded import EncodedExamples

_MAX_NAMES_CHARACTERS = 1000  # of a message that lists columns or fields
_HINT = re.compile(
    r"<\|?(?:image|video|audio|vision)(?:_pad|_start|_bos|_soft_token)?\|?>|<start_of_image>"
    r"|\[IMG\]",
    re.IGNORECASE,
)
"""Placeholders that processors of vision and audio models replace."""


def describe_encoding(
    examples: Sequence[Example], encoded: EncodedExamples
) -> tuple[list[str], list[str]]:
    """Return warnings and notes on tokens that are likely not what `examples` mean."""
    warnings, notes = [], []
    if encoded.control_tokens:
        n_found, named = _count(encoded.control_tokens, examples)
        are_pairs = any(examples[number].format == COMPLETION for number in encoded.control_tokens)
        raw = ", or raw if prompts and completions are formatted already" if are_pairs else ""
        warnings.append(
            f"special tokens are spelt out {n_found:,} times in the messages of "
            f"{len(encoded.control_tokens)} examples, as in {named}: they are split into ordinary "
            f"tokens; set keep_control_tokens if the special ones are meant{raw}"
        )
    if encoded.plain_control_tokens:
        n_found, named = _count(encoded.plain_control_tokens, examples)
        notes.append(
            f"special tokens are spelt out {n_found:,} times in the plain texts of "
            f"{len(encoded.plain_control_tokens)} examples, as in {named}: in a plain text, which "
            "no chat template formats, they are the special tokens"
        )
    if encoded.parted_prompts:
        number, (before, after) = min(encoded.parted_prompts.items())
        notes.append(
            f"{len(encoded.parted_prompts)} of {len(examples)} examples have a prompt whose last "
            f"tokens change with its answer, as in {examples[number].source} with {before!r} and "
            f"{after!r}: both are tokenised apart, as they are asked and answered; better end "
            "prompts without white space and begin answers with it"
        )
    if encoded.dropped_fields:
        named = ", ".join(f"{name} ({n:,})" for name, n in encoded.dropped_fields.items())
        warnings.append(
            f"lost, because the chat template has no place for them: {shorten_names(named)}"
        )
    return warnings, notes


def describe_columns(examples: Sequence[Example]) -> tuple[dict[str, int], list[str]]:
    """Return the number of rows by column that is not used, and notes on these columns."""
    unused = dict(Counter(name for example in examples for name in example.unused_columns))
    if not unused:
        return {}, []
    named = ", ".join(f"{name} ({n:,} rows)" for name, n in unused.items())
    return unused, [f"columns that are not used: {shorten_names(named)}"]


def describe_placeholders(examples: Sequence[Example]) -> tuple[int, str]:
    """Return how many examples hold placeholders of images, video or audio, and a warning or ""."""
    found = {n: word for n, example in enumerate(examples) if (word := _placeholder(example))}
    if not found:
        return 0, ""
    first = min(found)
    return len(found), (
        f"{len(found)} of {len(examples)} examples have a placeholder of an image, a video or "
        f"audio, as {found[first]!r} in {examples[first].source}: only text is learned, and the "
        "placeholder is learned as a word; remove it, or these examples"
    )


def shorten_names(text: str) -> str:
    """Return a list of names, cut at its end."""
    return text if len(text) <= _MAX_NAMES_CHARACTERS else f"{text[:_MAX_NAMES_CHARACTERS]} ..."


def _count(found: Mapping[int, int], examples: Sequence[Example]) -> tuple[int, str]:
    return sum(found.values()), examples[min(found)].source


def _placeholder(example: Example) -> str | None:
    for text in _texts(example):
        for found in _HINT.finditer(text):
            # With a closing tag it is HTML or SVG.
            if f"</{found[0][1:]}" not in text:
                return found[0]
    return None


def _texts(example: Example) -> Iterator[str]:
    texts = (example.text, example.prompt, example.completion)
    yield from (text for text in texts if text is not None)
    yield from (message["content"] for message in example.messages or ())
