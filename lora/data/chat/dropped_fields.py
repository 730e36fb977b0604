"""Fields of a conversation that the chat template has no place for, found by rendering.

A field is dropped if changing it changes nothing in the text: tool calls and reasoning are looked
for in the text that ends with their turn, tools and documents in the whole text and in the prompts.
Templates go by the kinds of messages and fields, not by their words, so conversations of the same
shape are looked at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lora.data.chat.template import REASONING_KEYS, ChatTemplate
from lora.data.chat.template_renderer import TemplateLimitError
from lora.data.reading.formats import Example
from lora.data.reading.messages import Message
from lora.errors import DataError

Dropped = tuple[int | None, str]
"""Index of the message and its field; None and a field of the whole example."""

_USED_BY_ITSELF = frozenset(("role", "content"))
_CHANGE = "x"
_MAX_SHAPES = 10_000  # that are remembered
_HAS_PLACE = frozenset(("tools", "tool_calls", *REASONING_KEYS))
"""What the templates that come with the package have a place for."""


class DroppedFieldFinder:
    """Finds the fields of conversations that one template drops, and remembers them by shape."""

    def __init__(self) -> None:
        self._by_shape: dict[object, list[Dropped]] = {}

    def find(
        self, template: ChatTemplate, example: Example, *, whole: bool = False
    ) -> list[Dropped]:
        """Return the dropped fields.

        With `whole` nothing but the text of the whole conversation is looked at, which is what is
        learned if every token is. Raises DataError if the template rejects the conversation.
        """
        fields = _fields(example)
        if not fields:
            return []
        whole = whole or template.has_generation_blocks
        shape = (whole, _shape(example), example.tools is None, example.documents is None)
        if shape not in self._by_shape:
            if len(self._by_shape) == _MAX_SHAPES:
                self._by_shape.clear()
            search = _Search(template, example, whole=whole)
            self._by_shape[shape] = [field for field in fields if not search.is_used(*field)]
        return self._by_shape[shape]


class _Search:
    """Looks for the fields of one conversation in its texts."""

    def __init__(self, template: ChatTemplate, example: Example, *, whole: bool) -> None:
        self._template, self._example, self._only_whole = template, example, whole
        self._whole = self._render(example, None)

    def is_used(self, index: int | None, field: str) -> bool:
        """Return whether changing a field changes a text."""
        changed = _change(self._example, index, field)
        try:
            if self._render(changed, None) != self._whole:
                return True
            return any(
                self._render(changed, n) != self._render(self._example, n)
                for n in self._prefixes(index)
            )
        except TemplateLimitError:
            raise
        except DataError:
            return True  # the template looks at it, and refuses the change

    def _prefixes(self, index: int | None) -> Sequence[int]:
        """Return lengths of prefixes in which a field may show, besides the whole."""
        messages = self._example.messages or ()
        if self._only_whole:
            return ()
        if index is not None and messages[index]["role"] == "assistant":
            return [index + 1] if index + 1 < len(messages) else []
        return [n for n in self._example.answers if n and (index is None or n > index)]

    def _render(self, example: Example, n_messages: int | None) -> str:
        """Return the whole text, or that of the first messages up to an answer."""
        messages = (example.messages or ())[:n_messages]
        is_prompt = n_messages is not None and messages[-1]["role"] != "assistant"
        return self._template.render(
            messages,
            tools=example.tools,
            documents=example.documents,
            add_generation_prompt=is_prompt,
        )


def name_dropped(example: Example, dropped: Sequence[Dropped]) -> list[str]:
    """Return the names of dropped fields, one for each field that is lost, for messages."""
    messages = example.messages or ()
    return [
        f"the content of {messages[index]['role']} messages"
        if index is not None and field == "content"
        else field
        for index, field in dropped
    ]


def refuse_dropped(names: Sequence[str], shipped: str | None) -> DataError:
    """Return the error for dropped fields; `shipped` is a template that may have a place for them.

    Its text is the same for all examples that lose the same fields.
    """
    found = sorted(set(names))
    has_place = shipped is not None and _HAS_PLACE.issuperset(found)
    way_out = (
        f"Set chat_template to {shipped}, a template that comes with lora and has it"
        if has_place
        else "Set chat_template to a file with a template that has it"
    )
    return DataError(
        f"the chat template has no place for {', '.join(found)}, which would be lost. {way_out}, "
        "or set allow_dropped_fields to learn without"
    )


def without_emptied_answers(example: Example, dropped: Sequence[Dropped]) -> Example:
    """Return the example without answers that are empty once their dropped fields are gone."""
    emptied = {
        index
        for index, field in dropped
        if index is not None and field != "content" and _is_emptied(example, index, dropped)
    }
    if not emptied:
        return example
    messages = example.messages or ()
    kept = [n for n in range(len(messages)) if n not in emptied]
    return dataclasses.replace(
        example,
        messages=tuple(messages[n] for n in kept),
        n_prompt_messages=sum(n < example.n_prompt_messages for n in kept),
        off_flags={
            kept.index(n): flag for n, flag in example.off_flags.items() if n not in emptied
        },
    )


def _is_emptied(example: Example, index: int, dropped: Sequence[Dropped]) -> bool:
    message = (example.messages or ())[index]
    lost = {field for n, field in dropped if n == index}
    calls_are_lost = "tool_calls" not in message or "tool_calls" in lost
    return message["role"] == "assistant" and not message["content"].strip() and calls_are_lost


def _fields(example: Example) -> list[Dropped]:
    """Return the fields that a template may drop."""
    fields: list[Dropped] = []
    for index, message in enumerate(example.messages or ()):
        has_calls = "tool_calls" in message
        if has_calls:
            fields.append((index, "tool_calls"))
        reasoning = _reasoning_key(message)
        if reasoning is not None:
            fields.append((index, reasoning))
        # An answer's own text is looked for wherever an answer is located.
        if message["content"].strip() and (message["role"] != "assistant" or has_calls):
            fields.append((index, "content"))
    whole = {"tools": example.tools, "documents": example.documents}
    return fields + [(None, name) for name, value in whole.items() if value is not None]


def _reasoning_key(message: Message) -> str | None:
    found = (key for key in REASONING_KEYS if str(message.get(key) or "").strip())
    return next(found, None)


def _shape(example: Example) -> object:
    return tuple(
        (
            m["role"],
            frozenset(m) - _USED_BY_ITSELF,
            _reasoning_key(m),
            bool(m["content"].strip()),
            min(len(m.get("tool_calls", ())), 2),
        )
        for m in example.messages or ()
    ), tuple(example.answers)


def _change(example: Example, index: int | None, field: str) -> Example:
    """Return the example with one field changed."""
    if index is None:
        if field == "tools":
            return dataclasses.replace(example, tools=None)
        return dataclasses.replace(example, documents=None)
    messages = list(example.messages or ())
    message = dict(messages[index])
    if field == "tool_calls":
        message[field] = [_changed_call(call) for call in message[field]]
    elif field == "content":
        message[field] += _CHANGE
    else:
        message.update(
            {key: f"{message[key]}{_CHANGE}" for key in REASONING_KEYS if key in message}
        )
    messages[index] = message
    return dataclasses.replace(example, messages=tuple(messages))


def _changed_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "name": function["name"] + _CHANGE}}
