"""Evaluates a model on examples: loss, and generated answers compared with references."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from lora.config import DataConfig, SamplingConfig
from lora.data.chat.prompts import Prompt, example_prompt
from lora.data.reading.formats import Example
from lora.data.sequences.batches import build_sequences, ordered_batches
from lora.data.sequences.embedding_rows import choose_pad_id
from lora.data.sequences.encode import encode_examples
from lora.data.sequences.encoded import EncodedExamples, check_has_targets
from lora.data.tokenizers.subword import TextTokenizer
from lora.decoder.decoder import Decoder
from lora.device import DeviceChoice
from lora.errors import DependencyError
from lora.inference.generate import generate
from lora.training.losses import loss_for
from lora.training.plain_step import evaluate


@dataclass(frozen=True)
class Answer:
    """A generated answer beside its reference."""

    prompt: str
    """The last user turn, as text."""
    answer: str
    reference: str


@dataclass(frozen=True)
class Scores:
    """Metrics of a model on examples; counts that do not apply to these examples are None."""

    loss: float
    """Mean over the target tokens, nats."""
    perplexity: float
    n_answers: int = 0
    n_fields: int | None = None
    """Fields of all references; None unless each is a JSON object."""
    valid_json: int | None = None
    """Answers that parse as JSON; None unless every reference does."""
    fields_right: int | None = None
    """Fields, of `n_fields`, to which the answers give the reference's value."""
    exact_match: int | None = None
    """Answers equal to their reference, except for white space at the ends."""
    bleu: float | None = None
    """Corpus BLEU by sacrebleu, 0 to 100; None unless requested."""
    max_length: int | None = None
    """Tokens of the longest sequence on which the loss was measured."""
    n_cut_examples: int | None = None
    """Examples longer than `max_length`, of which a part or all is not in the loss."""
    n_cut_tokens: int | None = None
    """Tokens of these that are not in the loss."""


def measure_loss(
    model: Decoder,
    examples: Sequence[Example],
    tokenizer: TextTokenizer,
    config: DataConfig,
    choice: DeviceChoice,
    batch_size: int = 8,
    *,
    now: datetime | None = None,
) -> float:
    """Return the mean loss in nats over the target tokens of `examples`.

    `now` is the date for chat templates that print one; None uses the clock. Raises DataError if
    there are no target tokens.
    """
    encoded = encode_for_loss(examples, tokenizer, config, now)
    return loss_of(model, encoded, tokenizer, config, choice, batch_size)


def encode_for_loss(
    examples: Sequence[Example],
    tokenizer: TextTokenizer,
    config: DataConfig,
    now: datetime | None = None,
) -> EncodedExamples:
    """Return the examples as documents. Raises DataError if none of their tokens is a target."""
    encoded = encode_examples(examples, tokenizer, config, now=now)
    check_has_targets(encoded, config.learn_on)
    return encoded


def loss_of(
    model: Decoder,
    encoded: EncodedExamples,
    tokenizer: TextTokenizer,
    config: DataConfig,
    choice: DeviceChoice,
    batch_size: int = 8,
) -> float:
    """Return the mean loss in nats over the target tokens of encoded examples."""
    pad, _ = choose_pad_id(tokenizer, model.config.vocab_size)
    sequences = build_sequences(
        encoded.documents, config.max_length, packing=config.packing, pad_id=pad, seed=0
    )
    batches = ordered_batches(sequences, batch_size, choice.device)
    return evaluate(model, batches, loss_for(model), choice.autocast)


def answer_examples(
    model: Decoder,
    examples: Sequence[Example],
    tokenizer: TextTokenizer,
    sampling: SamplingConfig,
    *,
    batch_size: int = 16,
    now: datetime | None = None,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> list[Answer]:
    """Return the model's answers to the examples that have a prompt and a reference, in order."""
    found = (example_prompt(example, tokenizer, now=now) for example in examples)
    prompts: list[Prompt] = [p for p in found if p is not None and p.reference is not None]
    # Sorted by length: prompts of one batch then need little padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    answers: dict[int, Answer] = {}
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        ids = [prompts[i].ids for i in indices]
        tokens = generate(model, ids, sampling, stop_ids=tokenizer.stop_ids)
        for i, new_tokens in zip(indices, tokens, strict=True):
            text = tokenizer.decode(new_tokens)
            answers[i] = Answer(prompts[i].text, text, prompts[i].reference or "")
        on_progress(len(answers) / len(prompts))
    return [answers[i] for i in range(len(prompts))]


def score(loss: float, answers: Sequence[Answer], *, bleu: bool = False) -> Scores:
    """Return the loss with the metrics of `answers`.

    Raises DependencyError if `bleu` is true and sacrebleu is not installed.
    """
    perplexity = math.exp(min(loss, 700.0))  # exp overflows a float above 709
    if not answers:
        return Scores(loss, perplexity)
    exact = sum(a.answer.strip() == a.reference.strip() for a in answers)
    references = [_parse(answer.reference) for answer in answers]
    valid = fields = right = None
    if all(reference is not None for reference in references):
        parsed = [_parse(answer.answer) for answer in answers]
        valid = sum(value is not None for value in parsed)
        fields, right = _count_fields(parsed, references)
    measured = _bleu(answers) if bleu else None
    return Scores(loss, perplexity, len(answers), fields, valid, right, exact, measured)


def wrong_fields(answer: Answer) -> list[str]:
    """Return the fields of a JSON reference that the answer lacks or gives another value."""
    value, reference = _parse(answer.answer), _parse(answer.reference)
    if not isinstance(reference, dict):
        return []
    return [name for name, expected in reference.items() if not _has(value, name, expected)]


def _parse(text: str) -> object:
    """Return the JSON value in `text`; None if it holds none (or null)."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value


def _count_fields(
    parsed: Sequence[object], references: Sequence[object]
) -> tuple[int, int] | tuple[None, None]:
    """Return the numbers of all and of correct fields; None unless all references are objects."""
    right = total = 0
    for value, reference in zip(parsed, references, strict=True):
        if not isinstance(reference, dict):
            return None, None
        total += len(reference)
        right += sum(_has(value, name, expected) for name, expected in reference.items())
    return total, right


def _has(value: object, name: str, expected: object) -> bool:
    if not isinstance(value, dict) or name not in value:
        return False
    found = value[name]
    # In Python True == 1; in JSON they differ.
    return found == expected and isinstance(found, bool) is isinstance(expected, bool)


def _bleu(answers: Sequence[Answer]) -> float:
    try:
        import sacrebleu
    except ImportError:
        raise DependencyError(
            "Cannot compute BLEU: sacrebleu is not installed. Run: pip install sacrebleu"
        ) from None
    hypotheses = [answer.answer for answer in answers]
    references = [[answer.reference for answer in answers]]
    return float(sacrebleu.corpus_bleu(hypotheses, references).score)
