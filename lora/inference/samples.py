"""Answers to a few held-out prompts while a run goes on: shown, and kept in the run's folder.

They are greedy, so nothing is drawn: neither the run's random states nor its result depend on
whether there are samples, and a second run writes the same file.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from lora.config import SamplingConfig
from lora.data.chat.prompts import Prompt, continuation_prompt, example_prompt
from lora.data.reading.formats import Example
from lora.data.tokenizers.subword import TextTokenizer
from lora.decoder.decoder import Decoder
from lora.errors import DataError, LoraError
from lora.inference.generate import generate
from lora.runs.directory import Run
from lora.runs.progress import Progress, visible
from lora.runs.record import SampleRow

_MAX_TRIED = 100
_SHOWN_CHARACTERS = 200


def choose_prompts(
    examples: Sequence[Example],
    tokenizer: TextTokenizer,
    most: int,
    *,
    most_tokens: int,
    now: datetime | None = None,
) -> list[Prompt]:
    """Return the first `most` prompts of at most `most_tokens` tokens that `examples` give.

    Plain texts give their beginning, to be gone on with; what asks nothing is passed over, and so
    is what the template (which tells the date `now`) refuses.
    """
    prompts: list[Prompt] = []
    for example in examples[:_MAX_TRIED] if most else ():
        try:
            prompt = (
                continuation_prompt(example.text, tokenizer)
                if example.text is not None
                else example_prompt(example, tokenizer, now=now)
            )
        except DataError:  # it can be learned, and cannot be asked
            continue
        if prompt is not None and len(prompt.ids) <= most_tokens:
            prompts.append(prompt)
        if len(prompts) == most:
            break
    return prompts


@dataclass
class SampleRecorder:
    """Answers the same prompts whenever it is called; a failure ends the samples, not the run.

    Rows of `samples.jsonl`: step, prompt (what was asked last), answer, reference (null where there
    is none), tokens (of the answer) and ended (by a token that ends answers, not by the limit).
    """

    model: Decoder
    prompts: Sequence[Prompt]
    tokenizer: TextTokenizer
    run: Run
    progress: Progress
    max_new_tokens: int
    has_told_cost: bool = False

    def __call__(self, step: int) -> None:
        """Answer the prompts with the model as it is after `step`; it trains on afterwards."""
        if not self.prompts:
            return
        began_s = time.perf_counter()
        sampling = SamplingConfig(max_new_tokens=self.max_new_tokens)
        ids = [prompt.ids for prompt in self.prompts]
        try:
            answers = generate(self.model, ids, sampling, stop_ids=self.tokenizer.stop_ids)
            for prompt, tokens in zip(self.prompts, answers, strict=True):
                self._keep(step, prompt, tokens)
        except (LoraError, RuntimeError) as error:  # RuntimeError: the device's memory is full
            self.progress.message(f"note: no samples from step {step} on: {error}")
            self.prompts = ()
            return
        if not self.has_told_cost:
            self.has_told_cost = True
            took_s = time.perf_counter() - began_s
            cost = f"{len(answers)} samples took {took_s:.1f} s, as at each evaluation"
            self.progress.message(f"({cost}; samples=0 leaves them out)")

    def _keep(self, step: int, prompt: Prompt, tokens: list[int]) -> None:
        answer = self.tokenizer.decode(tokens)
        row = SampleRow(
            step=step,
            prompt=prompt.text,
            answer=answer,
            reference=prompt.reference,
            tokens=len(tokens),
            ended=len(tokens) < self.max_new_tokens,
        )
        self.run.append_sample(row)
        lines = [f"step {step}, asked: {_short(prompt.text)}", f"  answer: {_short(answer)}"]
        if prompt.reference is not None:
            lines.append(f"  wanted: {_short(prompt.reference)}")
        self.progress.message("\n".join(lines))


def _short(text: str) -> str:
    """Return the beginning of `text` on one line, with nothing in it that steers a terminal."""
    flat = " ".join(text.split())
    most = _SHOWN_CHARACTERS
    return visible(flat if len(flat) <= most else f"{flat[:most]} ...")
