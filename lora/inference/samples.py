"""Samples during training: answers to a few validation prompts, shown and recorded.

Decoding is greedy and draws no random numbers: a run ends with the same bytes with and without
samples, and a second run writes the same samples.
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
from lora.decoder.language_model import LanguageModel
from lora.device import available_bytes
from lora.distributed.world import ALONE, World
from lora.errors import DataError, LoraError, TrainingError
from lora.inference.generate import generate
from lora.runs.directory import Run
from lora.runs.progress import Progress
from lora.runs.record import SampleRow
from lora.terminal import visible
from lora.training.out_of_memory import is_out_of_memory

_MAX_TRIED = 100
"""Examples that are looked at for prompts."""
_SHOWN_CHARACTERS = 200


def choose_prompts(
    examples: Sequence[Example],
    tokenizer: TextTokenizer,
    n_prompts: int,
    *,
    max_tokens: int,
    now: datetime | None = None,
) -> list[Prompt]:
    """Return the first `n_prompts` prompts of `examples` that have at most `max_tokens` tokens.

    The prompt of a plain text is its beginning. Examples without a prompt are skipped, and so are
    those that the chat template (which sees the date `now`) refuses.
    """
    prompts: list[Prompt] = []
    for example in examples[:_MAX_TRIED] if n_prompts else ():
        try:
            prompt = (
                continuation_prompt(example.text, tokenizer)
                if example.text is not None
                else example_prompt(example, tokenizer, now=now)
            )
        except DataError:  # fit for training, but its prompt alone is not: skip it
            continue
        if prompt is not None and len(prompt.ids) <= max_tokens:
            prompts.append(prompt)
        if len(prompts) == n_prompts:
            break
    return prompts


@dataclass
class SampleRecorder:
    """Generates and records answers to the same prompts whenever it is called.

    An error ends the samples, not the run. Where weights are sharded, running out of memory ends
    the run: the other processes wait for this one's part of the next block. The rows of
    `samples.jsonl` are SampleRow.
    """

    model: LanguageModel
    prompts: Sequence[Prompt]
    tokenizer: TextTokenizer
    run: Run
    progress: Progress
    max_new_tokens: int
    together: World = ALONE
    """The processes that answer the prompts at once, each with a part of the weights."""
    has_reported_cost: bool = False

    def __call__(self, step: int) -> None:
        """Answer the prompts with the model after `step`; its training mode is kept."""
        if not self.prompts:
            return
        began_s = time.perf_counter()
        sampling = SamplingConfig(max_new_tokens=self.max_new_tokens)
        ids = [prompt.ids for prompt in self.prompts]
        try:
            answers = generate(
                self.model,
                ids,
                sampling,
                stop_ids=self.tokenizer.stop_ids,
                free_bytes=self._free_bytes(step),
            )
            for prompt, tokens in zip(self.prompts, answers, strict=True):
                self._record(step, prompt, tokens)
        except (LoraError, RuntimeError) as error:  # RuntimeError: out of memory
            if not (self.together.is_alone or isinstance(error, LoraError)):
                raise _explain(error) from error
            self.progress.message(f"note: no samples from step {step} on: {error}")
            self.prompts = ()
            return
        if not self.has_reported_cost:
            self.has_reported_cost = True
            took_s = time.perf_counter() - began_s
            cost = f"{len(answers)} samples take {took_s:.1f} s at each evaluation"
            self.progress.message(f"({cost}; samples=0 turns them off)")

    def _free_bytes(self, step: int) -> int | None:
        """Return what all processes count with, which gather blocks equally often; None alone."""
        if self.together.is_alone:
            return None
        own = available_bytes(next(self.model.parameters()).device.type)
        known = self.together.gather(own, f"samples after step {step}")
        return None if None in known else min(known)

    def _record(self, step: int, prompt: Prompt, tokens: list[int]) -> None:
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
        lines = [f"step {step}, prompt: {_short(prompt.text)}", f"  answer: {_short(answer)}"]
        if prompt.reference is not None:
            lines.append(f"  reference: {_short(prompt.reference)}")
        self.progress.message("\n".join(lines))


def _explain(error: RuntimeError) -> RuntimeError:
    """Return the error of a process that cannot go on with the others."""
    if not is_out_of_memory(error):
        return error
    return TrainingError(
        "Cannot answer the prompts of the samples with sharded weights: memory ran out in this "
        "process, and the others wait for its part of the next block. Give --samples 0, or lower "
        "--samples or --sample-tokens; --resume continues from the newest checkpoint."
    )


def _short(text: str) -> str:
    """Return the beginning of `text` on one line, with control characters made visible."""
    flat = " ".join(text.split())
    is_short = len(flat) <= _SHOWN_CHARACTERS
    return visible(flat if is_short else f"{flat[:_SHOWN_CHARACTERS]} ...")
