"""Which text of a conversation is learned: the assistant's turns, as the model will write them.

If the template marks them itself (`{% generation %}`), its marks are taken. Else a turn is what the
text of the messages up to it has more than the text of those before it, which ends in the prompt
for the answer. Templates may show a turn in another way once others follow (some drop its
thinking). Such a turn is learned from the text that ends with it, which is what the model sees
when it writes that turn: the conversation then becomes several texts, each turn learned once.
Templates may also show a question in another way once it is answered (Mistral's leave out the
system's words): there the answer is put behind the prompt that the model will see.

A turn is lost, and counted, if it cannot be found, or if no word of it stands in what was found.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from lora.data.chat.template import ChatTemplate, Span
from lora.data.reading.formats import Example
from lora.data.reading.messages import Message
from lora.errors import DataError

_WORD, _SIGNS = re.compile(r"\w+"), re.compile(r"\S+")


@dataclass(frozen=True)
class SpannedText:
    """A text, and which of its characters are learned."""

    text: str
    spans: list[Span]
    """Not overlapping, in order."""


@dataclass
class ConversationTexts:
    """What a conversation becomes."""

    texts: list[SpannedText] = field(default_factory=list)
    n_lost_turns: int = 0
    """Turns of the assistant that could not be found in any text, and are not learned."""


def render_conversation(template: ChatTemplate, example: Example) -> ConversationTexts:
    """Return the texts of an example with messages, at least one, and what is learned of each.

    All turns of the assistant behind the prompt's messages are learned. Raises DataError if the
    template refuses the conversation.
    """
    if template.has_generation_blocks:
        return _take_marks(template, example)
    renderer = _Renderer(template, example)
    found, pending = ConversationTexts(), list[_Turn]()
    for number in _answers(example):
        turn = renderer.find_turn(number)
        if turn is None or not _tells(turn.text[slice(*turn.span)], renderer.content(number)):
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


def _take_marks(template: ChatTemplate, example: Example) -> ConversationTexts:
    messages, asked = example.messages or (), example.n_prompt_messages
    tools, documents = example.tools, example.documents
    text, spans = template.render_with_spans(messages, tools=tools, documents=documents)
    if asked:
        before = template.render_with_spans(messages[:asked], tools=tools, documents=documents)
        spans = spans[len(before[1]) :]
    told = "".join(text[slice(*span)] for span in spans)
    answers = [str(messages[number]["content"]) for number in _answers(example)]
    n_lost_turns = sum(not _tells(told, answer) for answer in answers)
    if n_lost_turns == len(answers):
        spans = []
    return ConversationTexts([SpannedText(text, [s for s in spans if s[0] < s[1]])], n_lost_turns)


@dataclass(frozen=True)
class _Turn:
    text: str
    """The conversation up to this turn, which is its end."""
    span: Span


def _count_shared(one: str, other: str) -> int:
    """Return how many characters two texts share at their beginnings."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _tells(text: str, content: str) -> bool:
    """Return whether a word of `content` stands in `text`, or `content` has none."""
    pattern = _WORD if _WORD.search(content) else _SIGNS
    words = pattern.finditer(content)  # the first mostly decides, so they are not all sought
    return not content.strip() or any(word[0] in text for word in words)


def _answers(example: Example) -> list[int]:
    """Return the numbers of the messages that are learned."""
    numbered = list(enumerate(example.messages or ()))[example.n_prompt_messages :]
    return [number for number, message in numbered if message["role"] == "assistant"]


class _Renderer:
    """Renders a conversation's beginnings."""

    def __init__(self, template: ChatTemplate, example: Example) -> None:
        self._template, self._example = template, example
        self._messages: tuple[Message, ...] = example.messages or ()
        self.whole = self._render(len(self._messages))

    def find_turn(self, number: int) -> _Turn | None:
        """Return the turn of message `number`, or None if it cannot be told from what is before."""
        try:
            is_last = number + 1 == len(self._messages)
            text = self.whole if is_last else self._render(number + 1)
            prompt = self._render(number, add_generation_prompt=True)
            if text.startswith(prompt):
                return _Turn(text, (len(prompt), len(text)))
            # The prompt for an answer may hold more than an answer begins with ("<think>").
            before = self._render(number)
        except DataError:
            return None  # the template takes the whole, and not its beginning
        start = _count_shared(prompt, text)
        if prompt.startswith(before) and len(before) <= start < len(text):
            return _Turn(text, (start, len(text)))
        return self._put_behind(prompt, text, number)

    def content(self, number: int) -> str:
        return str(self._messages[number]["content"])

    def _put_behind(self, prompt: str, text: str, number: int) -> _Turn | None:
        """Return the prompt with what `text` has behind the same question and its closing mark."""
        question = self.content(number - 1).strip() if number else ""
        closed = prompt[prompt.rfind(question) :]
        place = text.rfind(closed)
        if not question or question not in prompt or len(closed) == len(question) or place < 0:
            return None
        whole = prompt + text[place + len(closed) :]
        return _Turn(whole, (len(prompt), len(whole)))

    def _render(self, n_messages: int, *, add_generation_prompt: bool = False) -> str:
        return self._template.render(
            self._messages[:n_messages],
            tools=self._example.tools,
            documents=self._example.documents,
            add_generation_prompt=add_generation_prompt,
        )
