"""Prompts for generation, with the reference answer where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
        prompt = plain_prompt(example.prompt or "", tokenizer)
        return Prompt(prompt.ids, prompt.text, example.completion) if prompt.ids else None
    messages = example.messages or ()
    answers = example.answers
    if not answers or answers[-1] == 0:
        return None
    last = answers[-1]
    template = compile_template(tokenizer, now)
    marked, n_marked = ControlTokens(tokenizer).mark(example)
    rendered = template.render(
        (marked.messages or ())[:last],
        tools=marked.tools,
        documents=marked.documents,
        add_generation_prompt=True,
    )
    ids = encode_marked(tokenizer, rendered) if n_marked else tokenizer.encode(rendered)
    asked, reference = str(messages[last - 1]["content"]), str(messages[last]["content"])
    return Prompt(ids, asked, reference)
