"""How well a model does on examples: loss, and answers against references."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora.config import DataConfig, SamplingConfig
from lora.data.chat.prompts import Prompt, example_prompt
from lora.data.reading.formats import Example
from lora.data.sequences.batches import build_sequences, ordered_batches
from lora.data.sequences.encode import encode_examples
from lora.data.sequences.encoded import check_has_targets
from lora.data.tokenizers.subword import TextTokenizer
from lora.decoder.decoder import Decoder
from lora.device import DeviceChoice
from lora.errors import DependencyError
from lora.inference.generate import generate
from lora.training.losses import loss_for
from lora.training.plain_step import evaluate


@dataclass(frozen=True)
class Answer:
    """One answer beside what it should have been."""

    asked: str
    answer: str
    reference: str


@dataclass(frozen=True)
class Scores:
    """What was measured; the counts are None where they say nothing of these answers."""

    loss: float
    """Mean over the learned tokens, nats."""
    perplexity: float
    n_answers: int = 0
    n_fields: int | None = None
    """Fields of the references, where each is a JSON object."""
    valid_json: int | None = None
    """Answers that parse as JSON; None unless every reference does."""
    fields_right: int | None = None
    """Fields, of `n_fields`, that the answers have with the reference's value."""
    exact_match: int | None = None
    """Answers equal to their reference, white space at the ends aside."""
    bleu: float | None = None
    """Corpus BLEU by sacrebleu, 0 to 100; None unless asked for."""


def measure_loss(
    model: Decoder,
    examples: Sequence[Example],
    tokenizer: TextTokenizer,
    config: DataConfig,
    choice: DeviceChoice,
    batch_size: int = 8,
) -> float:
    """Return the mean loss in nats over the learned tokens of `examples`.

    Raises DataError if nothing in them is learned.
    """
    encoded = encode_examples(examples, tokenizer, config)
    check_has_targets(encoded, config.learn_on)
    pad = tokenizer.pad_id if tokenizer.pad_id is not None else 0
    rows = build_sequences(
        encoded.documents, config.max_length, packing=config.packing, pad_id=pad, seed=0
    )
    batches = ordered_batches(rows, batch_size, choice.device)
    return evaluate(model, batches, loss_for(model), choice.autocast)


def answer_examples(
    model: Decoder,
    examples: Sequence[Example],
    tokenizer: TextTokenizer,
    sampling: SamplingConfig,
    *,
    batch_size: int = 16,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> list[Answer]:
    """Return the model's answers to the examples that ask something, in their order."""
    found = (example_prompt(example, tokenizer) for example in examples)
    prompts: list[Prompt] = [p for p in found if p is not None and p.reference is not None]
    # Prompts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n].ids))
    answers: dict[int, Answer] = {}
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        ids = [prompts[n].ids for n in numbers]
        tokens = generate(model, ids, sampling, stop_ids=tokenizer.stop_ids)
        for n, new in zip(numbers, tokens, strict=True):
            text = tokenizer.decode(new)
            answers[n] = Answer(prompts[n].text, text, prompts[n].reference or "")
        on_progress(len(answers) / len(prompts))
    return [answers[n] for n in range(len(prompts))]


def score(loss: float, answers: Sequence[Answer], *, bleu: bool = False) -> Scores:
    """Return the scores of `answers` beside the loss.

    Raises DependencyError if BLEU is asked for and sacrebleu is not installed.
    """
    perplexity = math.exp(min(loss, 700.0))
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
    """Return which fields of the reference, where it is a JSON object, are not so in `answer`."""
    value, reference = _parse(answer.answer), _parse(answer.reference)
    if not isinstance(reference, dict):
        return []
    return [name for name, want in reference.items() if not _has(value, name, want)]


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
    """Return the references' fields and the right ones; None unless all are JSON objects."""
    right = total = 0
    for value, reference in zip(parsed, references, strict=True):
        if not isinstance(reference, dict):
            return None, None
        total += len(reference)
        right += sum(_has(value, name, want) for name, want in reference.items())
    return total, right


def _has(value: object, name: str, want: object) -> bool:
    if not isinstance(value, dict) or name not in value:
        return False
    seen = value[name]
    # To Python true is 1; in JSON it is not.
    return seen == want and isinstance(seen, bool) is isinstance(want, bool)


def _bleu(answers: Sequence[Answer]) -> float:
    try:
        import sacrebleu
    except ImportError:
        raise DependencyError(
            "BLEU was asked for: sacrebleu is not installed. Run: pip install sacrebleu"
        ) from None
    hypotheses = [answer.answer for answer in answers]
    references = [[answer.reference for answer in answers]]
    return float(sacrebleu.corpus_bleu(hypotheses, references).score)
