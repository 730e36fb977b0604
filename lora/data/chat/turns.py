"""The assistant's turns in a rendered conversation, which are the text to train on.

If the template marks them itself (`{% generation %}`), its marks are used. Otherwise a turn is the
difference between the text of the messages up to it and the text of those before it, which ends in
the generation prompt. Templates may render a turn differently once others follow (some drop its
thinking). Such a turn is trained on in the text that ends with it, which is what the model sees
when it generates that turn: the conversation then becomes several texts, with each turn a target
once. Templates may also render a question differently once it is answered (Mistral's leave out the
system message): there the answer is appended to the prompt that the model will see.

A turn is lost, and counted, if it cannot be located, or if no word of it is in the located text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from lora.data.chat.dropped_fields import (
    DroppedFieldFinder,
    name_dropped,
    without_emptied_answers,
)
from lora.data.chat.template import ChatTemplate, Span
from lora.data.chat.template_renderer import TemplateLimitError
from lora.data.reading.formats import Example
from lora.data.reading.messages import Message
from lora.errors import DataError

_WORD, _SYMBOLS = re.compile(r"\w+"), re.compile(r"\S+")


@dataclass(frozen=True)
class SpannedText:
    """A text, and which of its characters are targets."""

    text: str
    spans: list[Span]
    """Not overlapping, in order."""


@dataclass
class ConversationTexts:
    """The texts of one conversation."""

    texts: list[SpannedText] = field(default_factory=list)
    n_lost_turns: int = 0
    """Assistant turns that could not be located in any text, and are not trained on."""
    dropped: list[str] = field(default_factory=list)
    """Names of the fields that the template has no place for, one for each that is lost."""


def render_conversation(template: ChatTemplate, example: Example) -> ConversationTexts:
    """Return the texts of an example with messages, at least one, with the targets in each.

    All assistant turns after the prompt's messages are targets, except those that a loss flag turns
    off. Raises DataError if the template rejects the conversation.
    """
    if template.has_generation_blocks:
        return _take_marks(template, example)
    renderer = _Renderer(template, example)
    found, pending = ConversationTexts(), list[_Turn]()
    for number in example.answers:
        turn = renderer.find_turn(number)
        if turn is None or not _has_content(turn.text[slice(*turn.span)], renderer.content(number)):
            found.n_lost_turns += 1
        else:
            pending.append(turn)
    text = renderer.whole
    while pending:
        spans = [turn.span for turn in pending if text.startswith(turn.text)]
        pending = [turn for turn in pending if not text.startswith(turn.text)]
        if spans:
            found.texts.append(SpannedText(text, spans))
        text = pending[-1].text if pending else ""
    if not found.texts:
        found.texts.append(SpannedText(renderer.whole, []))
    return found


def render_example(
    template: ChatTemplate, example: Example, finder: DroppedFieldFinder, *, whole: bool
) -> ConversationTexts:
    """Return the texts of a conversation; `whole`: its whole text, without spans.

    Answers that are empty without the fields that the template drops are left out; there is no text
    if nothing else is in the conversation.
    """
    dropped = finder.find(template, example, whole=whole)
    names = name_dropped(example, dropped)
    example = without_emptied_answers(example, dropped)
    if not example.messages:
        return ConversationTexts(dropped=names)
    if whole:
        tools, documents = example.tools, example.documents
        text = template.render(example.messages, tools=tools, documents=documents)
        return ConversationTexts([SpannedText(text, [])], dropped=names)
    found = render_conversation(template, example)
    found.dropped = names
    return found


def _take_marks(template: ChatTemplate, example: Example) -> ConversationTexts:
    messages, asked = example.messages or (), example.n_prompt_messages
    tools, documents = example.tools, example.documents
    text, spans = template.render_with_spans(messages, tools=tools, documents=documents)

    def count(n_messages: int) -> int:
        part = messages[:n_messages]
        if not part:
            return 0
        return len(template.render_with_spans(part, tools=tools, documents=documents)[1])

    skipped = set(range(count(asked)))
    for number in example.off_flags:
        if messages[number]["role"] == "assistant":
            skipped |= set(range(count(number), count(number + 1)))
    spans = [span for index, span in enumerate(spans) if index not in skipped]
    marked = "".join(text[slice(*span)] for span in spans)
    answers = [str(messages[number]["content"]) for number in example.answers]
    n_lost_turns = sum(not _has_content(marked, answer) for answer in answers)
    if n_lost_turns == len(answers):
        spans = []
    return ConversationTexts([SpannedText(text, [s for s in spans if s[0] < s[1]])], n_lost_turns)


@dataclass(frozen=True)
class _Turn:
    text: str
    """The conversation up to and including this turn."""
    span: Span


def _common_prefix_length(one: str, other: str) -> int:
    """Return the length of the common prefix of two texts."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _has_content(text: str, content: str) -> bool:
    """Return whether a word of `content` is in `text`, or `content` has none."""
    pattern = _WORD if _WORD.search(content) else _SYMBOLS
    words = pattern.finditer(content)  # lazy: the first word mostly decides
    return not content.strip() or any(word[0] in text for word in words)


class _Renderer:
    """Renders prefixes of a conversation."""

    def __init__(self, template: ChatTemplate, example: Example) -> None:
        self._template, self._example = template, example
        self._messages: tuple[Message, ...] = example.messages or ()
        self.whole = self._render(len(self._messages))

    def find_turn(self, number: int) -> _Turn | None:
        """Return the turn of message `number`, or None if it cannot be located."""
        try:
            is_last = number + 1 == len(self._messages)
            text = self.whole if is_last else self._render(number + 1)
            prompt = self._render(number, add_generation_prompt=True)
            if text.startswith(prompt):
                return _Turn(text, (len(prompt), len(text)))
            # The generation prompt may end in more than an answer begins with ("<think>").
            before = self._render(number)
        except TemplateLimitError:
            raise
        except DataError:
            return None  # the template accepts the whole conversation, but not this prefix
        start = _common_prefix_length(prompt, text)
        if prompt.startswith(before) and len(before) <= start < len(text):
            return _Turn(text, (start, len(text)))
        return self._append_to_prompt(prompt, text, number)

    def content(self, number: int) -> str:
        return str(self._messages[number]["content"])

    def _append_to_prompt(self, prompt: str, text: str, number: int) -> _Turn | None:
        """Return the prompt plus what follows the same question and its end marker in `text`."""
        question = self.content(number - 1).strip() if number else ""
        closed = prompt[prompt.rfind(question) :]
        start = text.rfind(closed)
        if not question or question not in prompt or len(closed) == len(question) or start < 0:
            return None
        whole = prompt + text[start + len(closed) :]
        return _Turn(whole, (len(prompt), len(whole)))

    def _render(self, n_messages: int, *, add_generation_prompt: bool = False) -> str:
        return self._template.render(
            self._messages[:n_messages],
            tools=self._example.tools,
            documents=self._example.documents,
            add_generation_prompt=add_generation_prompt,
        )
