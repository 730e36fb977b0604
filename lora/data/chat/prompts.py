"""Prompts for generation, with the reference answer where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from lora.data.chat.choose_template import begin_ids, compile_template
from lora.data.chat.control_tokens import ControlTokens, encode_marked
from lora.data.reading.formats import Example
from lora.data.reading.messages import Message
from lora.data.tokenizers.subword import TextTokenizer

_PROMPT_TOKENS, _TEXT_CHARACTERS = 32, 2000


@dataclass(frozen=True)
class Prompt:
    """One prompt as token ids, with the reference answer where there is one."""

    ids: list[int]
    text: str
    """For display: the last message before the answer, or the plain text."""
    reference: str | None = None
    source: str = ""
    """Where the example comes from: "file:line", or "row n"."""
    turn: int = 1
    """Which of the example's learned answers the reference is, from 1."""


def chat_prompt(messages: Sequence[Message], tokenizer: TextTokenizer) -> Prompt:
    """Return the conversation up to the start of the assistant's next turn.

    Special tokens that the messages spell out are split, as in training. Raises DataError if the
    tokenizer has no chat template, or it rejects the messages.
    """
    template = compile_template(tokenizer)
    marked, _ = ControlTokens(tokenizer).mark_messages(messages)
    rendered = template.render(marked, add_generation_prompt=True)
    ids = encode_marked(tokenizer, rendered) if marked is not messages else None
    return Prompt(ids or tokenizer.encode(rendered), str(messages[-1]["content"]))


def plain_prompt(text: str, tokenizer: TextTokenizer) -> Prompt:
    """Return a text to continue, after a BOS token if the model uses one."""
    return Prompt([*begin_ids(tokenizer), *tokenizer.encode(text)], text)


def continuation_prompt(text: str, tokenizer: TextTokenizer) -> Prompt | None:
    """Return the beginning of a plain text, with what follows as reference; None if too short.

    The beginning has at most 32 tokens and at most half of the text's.
    """
    tokens = tokenizer.encode(text[:_TEXT_CHARACTERS])
    n_given = min(_PROMPT_TOKENS, len(tokens) // 2)
    if not n_given:
        return None
    given = tokenizer.decode(tokens[:n_given], skip_special_tokens=False)
    rest = tokenizer.decode(tokens[n_given : 2 * _PROMPT_TOKENS], skip_special_tokens=False)
    return Prompt([*begin_ids(tokenizer), *tokens[:n_given]], given, rest)


def example_prompt(
    example: Example, tokenizer: TextTokenizer, *, now: datetime | None = None
) -> Prompt | None:
    """Return the prompt of the last answer that is learned, with that answer; None for plain texts.

    `now` is the date for chat templates that print one; None uses the clock.
    """
    if example.completion is not None:
        return _completion_prompt(example, tokenizer)
    answers = example.answers
    if not answers or answers[-1] == 0:
        return None
    return _Asker(example, tokenizer, now).prompt_before(answers[-1])


def example_prompts(
    example: Example, tokenizer: TextTokenizer, *, now: datetime | None = None
) -> list[Prompt]:
    """Return the prompt of each answer that is learned, with that answer; none for plain texts.

    Each is asked after the example's own earlier turns. The reference of a turn with tool calls is
    what the model would generate for them, as decoded. A turn without any text, such as a call
    that the template leaves out, is not asked.
    """
    if example.completion is not None:
        prompt = _completion_prompt(example, tokenizer)
        return [] if prompt is None else [prompt]
    if not example.answers:
        return []
    asker = _Asker(example, tokenizer, now)
    found = (asker.prompt_before(number) for number in example.answers if number)
    prompts = [prompt for prompt in found if prompt.reference]
    return [replace(prompt, turn=turn) for turn, prompt in enumerate(prompts, start=1)]


def _completion_prompt(example: Example, tokenizer: TextTokenizer) -> Prompt | None:
    prompt = plain_prompt(example.prompt or "", tokenizer)
    if not prompt.ids:
        return None
    return replace(prompt, reference=example.completion, source=example.source)


class _Asker:
    """Asks for the answers of one conversation."""

    def __init__(self, example: Example, tokenizer: TextTokenizer, now: datetime | None) -> None:
        self._example, self._tokenizer = example, tokenizer
        self._template = compile_template(tokenizer, now)
        self._marked, self._n_marked = ControlTokens(tokenizer).mark(example)

    def prompt_before(self, number: int) -> Prompt:
        """Return the prompt whose answer is message `number`, which is not the first."""
        rendered = self._render(self._marked, number, add_generation_prompt=True)
        tokenizer, messages = self._tokenizer, self._example.messages or ()
        ids = encode_marked(tokenizer, rendered) if self._n_marked else tokenizer.encode(rendered)
        asked = str(messages[number - 1]["content"])
        return Prompt(ids, asked, self._reference(number), self._example.source)

    def _reference(self, number: int) -> str:
        message = (self._example.messages or ())[number]
        content = str(message["content"])
        if "tool_calls" not in message:
            return content
        prompt = self._render(self._example, number, add_generation_prompt=True)
        whole = self._render(self._example, number + 1)
        if not whole.startswith(prompt):
            return content
        ids = self._tokenizer.encode(whole[len(prompt) :])
        stops = self._tokenizer.stop_ids
        n_said = next((n for n, token in enumerate(ids) if token in stops), len(ids))
        return self._tokenizer.decode(ids[:n_said]).strip()

    def _render(
        self, example: Example, n_messages: int, *, add_generation_prompt: bool = False
    ) -> str:
        return self._template.render(
            (example.messages or ())[:n_messages],
            tools=example.tools,
            documents=example.documents,
            add_generation_prompt=add_generation_prompt,
        )
