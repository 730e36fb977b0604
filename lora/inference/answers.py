"""Answers of a model to the questions of examples, beside the references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from lora.config import SamplingConfig
from lora.data.chat.prompts import Prompt, example_prompts
from lora.data.reading.formats import Example
from lora.data.tokenizers.subword import TextTokenizer
from lora.decoder.language_model import LanguageModel
from lora.distributed.world import ALONE, World
from lora.inference.generate import generate
from lora.inference.shared import dealt, in_order

REASONING_END = "</think>"
"""Ends the reasoning in the answers of released reasoning models."""


@dataclass(frozen=True)
class Answer:
    """A generated answer beside its reference."""

    prompt: str
    """The last user turn, as text."""
    answer: str
    reference: str
    source: str = ""
    """Where the example comes from: "file:line", or "row n"."""
    turn: int = 1
    """Which of the example's answers this is, from 1."""
    is_cut: bool = False
    """Whether it reached the maximum number of new tokens."""

    @property
    def scored(self) -> str:
        """The text that is compared: the answer, without its reasoning if the reference has none.

        Reasoning ends at the last `</think>`.
        """
        if REASONING_END not in self.answer or REASONING_END in self.reference:
            return self.answer
        return self.answer.rpartition(REASONING_END)[2]

    @property
    def is_exact(self) -> bool:
        """Whether the answer equals its reference, except for white space at the ends."""
        return self.scored.strip() == self.reference.strip()


def ask_for_all(
    examples: Sequence[Example], tokenizer: TextTokenizer, now: datetime | None = None
) -> list[Prompt]:
    """Return the prompts of all answers that the examples teach, in order.

    `now` is the date for chat templates that print one. Raises DataError if the chat template
    refuses an example.
    """
    found = (example_prompts(example, tokenizer, now=now) for example in examples)
    return [prompt for prompts in found for prompt in prompts]


def answer_examples(
    model: LanguageModel,
    examples: Sequence[Example],
    tokenizer: TextTokenizer,
    sampling: SamplingConfig,
    *,
    batch_size: int = 16,
    now: datetime | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    world: World = ALONE,
) -> list[Answer]:
    """Return the model's answers to the examples that have a prompt and a reference, in order.

    Every assistant turn that is learned is asked, after the example's own earlier turns.
    """
    prompts = ask_for_all(examples, tokenizer, now)
    return answer_prompts(
        model,
        prompts,
        tokenizer,
        sampling,
        batch_size=batch_size,
        on_progress=on_progress,
        world=world,
    )


def answer_prompts(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    tokenizer: TextTokenizer,
    sampling: SamplingConfig,
    *,
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    world: World = ALONE,
) -> list[Answer]:
    """Return the model's answers, in the order of `prompts`; several processes share them.

    `on_progress(answered, all)` is called after each batch.
    """
    # Sorted by length: prompts of one batch then need little padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    own, written = dealt(len(prompts), world), list[list[int]]()
    for first in range(0, len(own), batch_size):
        places = own[first : first + batch_size]  # in `order`
        ids = [prompts[order[place]].ids for place in places]
        # Their seeds are those that they have in one process.
        numbers = [place % batch_size for place in places]
        written += generate(model, ids, sampling, stop_ids=tokenizer.stop_ids, numbers=numbers)
        # The other processes are taken to be as far as this one.
        on_progress(len(prompts) * len(written) // len(own), len(prompts))
    written = in_order(world.gather(written, "the answers of all processes"))
    answers = {
        i: _answer(prompts[i], tokens, tokenizer, sampling.max_new_tokens)
        for i, tokens in zip(order, written, strict=True)
    }
    return [answers[i] for i in range(len(prompts))]


def _answer(
    prompt: Prompt, tokens: Sequence[int], tokenizer: TextTokenizer, max_new_tokens: int
) -> Answer:
    return Answer(
        prompt.text,
        tokenizer.decode(tokens),
        prompt.reference or "",
        source=prompt.source,
        turn=prompt.turn,
        is_cut=len(tokens) >= max_new_tokens,
    )
