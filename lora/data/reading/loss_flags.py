"""Loss flags of messages and rows: what is flagged off is context and never a target.

Flags are the keys of FLAGS, of a message or of a row; a row's flag may also be a list with a value
for each message. A flag that cannot be honoured is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora.data.reading.cells import from_json, is_blank, kind_of
from lora.errors import DataError

FLAGS = ("weight", "train", "trainable", "training", "loss", "loss_mask")
"""Keys under which other tools' users say whether a turn or a row counts in the loss."""
_TRUE, _FALSE = frozenset(("1", "1.0", "true", "yes")), frozenset(("0", "0.0", "false", "no"))


def take_message_flags(
    messages: Sequence[dict[str, Any]], name: str, n_prompt_messages: int
) -> dict[int, str]:
    """Changes `messages` in place: their flags go. Return which are off: the flag's name by index.

    Raises DataError for a flag that is neither on nor off, for flags that disagree, and for one
    that asks to learn a message that is no answer.
    """
    is_off: dict[int, str] = {}
    for index, message in enumerate(messages):
        found = {key: message.pop(key) for key in FLAGS if key in message}
        if not found:
            continue
        named = {f"{name}[{index}].{key}": value for key, value in found.items()}
        values = {key: _as_flag(key, value) for key, value in named.items()}
        if len(set(values.values())) > 1:
            raise DataError(f"{' and '.join(values)} disagree: keep one of them")
        flag, is_on = next(iter(values.items()))
        if not is_on:
            is_off[index] = flag
        elif set(found) != {"weight"}:  # a weight of 1 is what every message has
            _check_is_answer(messages, index, n_prompt_messages, flag)
    return is_off


def read_row_flags(
    row: Mapping[str, Any], messages: Sequence[dict[str, Any]], n_prompt_messages: int = 0
) -> dict[int, str]:
    """Return which messages a row's flags turn off; a row without messages counts as one.

    Raises DataError for a flag that cannot be honoured.
    """
    n, is_off = max(1, len(messages)), dict[int, str]()
    for key in FLAGS:
        if is_blank(row.get(key)):
            continue
        value = from_json(row[key], key)
        if isinstance(value, list | tuple):
            if not messages or len(value) != n:
                raise DataError(
                    f"{key} has {len(value)} values for {len(messages)} messages: one value for "
                    "each message is needed"
                )
            flags = [_as_flag(f"{key}[{i}]", each) for i, each in enumerate(value)]
            for index, is_on in enumerate(flags):
                if is_on:
                    _check_is_answer(messages, index, n_prompt_messages, f"{key}[{index}]")
        else:
            flags = [_as_flag(key, value)] * n
        is_off |= {index: key for index, is_on in enumerate(flags) if not is_on}
    return is_off


def _as_flag(name: str, value: object) -> bool:
    text = str(value).strip().lower()
    if not isinstance(value, str | int | float) or text not in _TRUE | _FALSE:
        seen = repr(value) if isinstance(value, str | int | float) else kind_of(value)
        raise DataError(
            f"{name} is {seen}: a loss flag must be 0, 1, true or false; rename or remove it if it "
            "is something else"
        )
    return text in _TRUE


def _check_is_answer(
    messages: Sequence[dict[str, Any]], index: int, n_prompt_messages: int, flag: str
) -> None:
    role = messages[index]["role"]
    if role != "assistant" or index < n_prompt_messages:
        part = f"a message of the role {role}" if role != "assistant" else "part of the prompt"
        raise DataError(
            f"{flag} asks to learn {part}: only the assistant's answers are learned; set the flag "
            "to 0 or remove it (learn_on='all' learns every token of rows without flags)"
        )
