"""Evaluates a model on examples: loss, and generated answers compared with references."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from lora.config import DataConfig, SamplingConfig
from lora.data.chat.prompts import Prompt
from lora.data.reading.formats import Example
from lora.data.sequences.batches import Batch, build_sequences, ordered_batches
from lora.data.sequences.embedding_rows import choose_pad_id
from lora.data.sequences.encode import encode_examples
from lora.data.sequences.encoded import EncodedExamples, check_has_targets
from lora.data.tokenizers.subword import TextTokenizer
from lora.decoder.language_model import LanguageModel
from lora.decoder.quantised.base import dtype_of
from lora.device import DeviceChoice
from lora.distributed.world import ALONE, World
from lora.inference.answers import Answer, answer_prompts, ask_for_all
from lora.inference.eval_config import choose_metrics
from lora.inference.scoring.json_fields import count_fields, parse_json, right_fields
from lora.inference.scoring.labels import Classification, classify
from lora.inference.scoring.overlap import check_overlap_packages, corpus_bleu, rouge_l
from lora.pretrained.load.task import settled_packing
from lora.training.losses import loss_for
from lora.training.plain_step import evaluate

OnProgress = Callable[[str, int, int], None]
CPU_ANSWERS, GPU_ANSWERS = 16, 128
"""Prompts that are answered together, if memory has room for them."""


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
    field_accuracy: dict[str, float] | None = None
    """By field: the fraction of the references with it whose answers give it the same value."""
    exact_match: int | None = None
    """Answers equal to their reference, except for white space at the ends."""
    classification: Classification | None = None
    """None unless requested, or the references are few and short."""
    rouge_l: float | None = None
    """Mean ROUGE-L F-measure by rouge-score, 0 to 1; None unless requested."""
    bleu: float | None = None
    """Corpus BLEU by sacrebleu, 0 to 100; None unless requested."""
    n_cut_answers: int | None = None
    """Answers that reached the maximum number of new tokens."""
    max_length: int | None = None
    """Tokens of the longest sequence on which the loss was measured."""
    n_cut_examples: int | None = None
    """Examples longer than `max_length`, of which a part or all is not in the loss."""
    n_cut_tokens: int | None = None
    """Tokens of these that are not in the loss."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: the scores, and the answers that they are of."""

    scores: Scores
    answers: list[Answer]
    metrics: tuple[str, ...] = ()
    """Those that were computed of the answers."""


@dataclass(frozen=True)
class EvaluationData:
    """Examples made ready: encoded for the loss, and the prompts to answer."""

    encoded: EncodedExamples
    prompts: list[Prompt]
    metrics: tuple[str, ...]
    config: DataConfig

    def evaluate(
        self,
        model: LanguageModel,
        tokenizer: TextTokenizer,
        choice: DeviceChoice,
        sampling: SamplingConfig,
        on_progress: OnProgress = lambda stage, done, total: None,
        world: World = ALONE,
    ) -> Evaluation:
        """Return the loss, and the scores of the model's answers; several processes share them.

        `on_progress(stage, done, total)` is called after each batch.
        """

        def of_loss(done: int, total: int) -> None:
            on_progress("loss", done, total)

        def of_answers(done: int, total: int) -> None:
            on_progress("answers", done, total)

        loss = loss_of(
            model, self.encoded, tokenizer, self.config, choice, on_progress=of_loss, world=world
        )
        answers = answer_prompts(
            model,
            self.prompts,
            tokenizer,
            sampling,
            batch_size=GPU_ANSWERS if choice.device.type == "cuda" else CPU_ANSWERS,
            on_progress=of_answers,
            world=world,
        )
        counts = self.encoded.counts
        scores = replace(
            score(loss, answers, self.metrics),
            max_length=self.config.max_length,
            n_cut_examples=counts.n_truncated + counts.n_dropped,
            n_cut_tokens=counts.n_cut_tokens,
        )
        return Evaluation(scores, answers, self.metrics)


def prepare_evaluation(
    examples: Sequence[Example],
    tokenizer: TextTokenizer,
    config: DataConfig,
    n_answered: int = 0,
    metrics: Sequence[str] = ("auto",),
    *,
    now: datetime | None = None,
) -> EvaluationData:
    """Return the examples made ready, the first `n_answered` of them with prompts.

    `now` is the date for chat templates that print one; None uses the clock. Raises DataError if
    no token is a target, or `metrics` do not fit the references; DependencyError if a package that
    they need is missing.
    """
    encoded = encode_for_loss(examples, tokenizer, config, now)
    prompts = ask_for_all(examples[:n_answered], tokenizer, now)
    chosen = choose_metrics(metrics, [prompt.reference or "" for prompt in prompts])
    check_overlap_packages(chosen)
    return EvaluationData(encoded, prompts, chosen, config)


def measure_loss(
    model: LanguageModel,
    examples: Sequence[Example],
    tokenizer: TextTokenizer,
    config: DataConfig,
    choice: DeviceChoice,
    batch_size: int = 8,
    *,
    now: datetime | None = None,
    world: World = ALONE,
) -> float:
    """Return the mean loss in nats over the target tokens of `examples`.

    `now` is the date for chat templates that print one; None uses the clock. Raises DataError if
    there are no target tokens.
    """
    encoded = encode_for_loss(examples, tokenizer, config, now)
    return loss_of(model, encoded, tokenizer, config, choice, batch_size, world=world)


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
    model: LanguageModel,
    encoded: EncodedExamples,
    tokenizer: TextTokenizer,
    config: DataConfig,
    choice: DeviceChoice,
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    world: World = ALONE,
) -> float:
    """Return the mean loss in nats over the target tokens of encoded examples.

    Several processes get batches in turn; the loss has the bits of one process's.
    `on_progress(done, total)` is called with batches. Raises ConfigError for packing=True where
    the architecture has none.
    """
    pad, _ = choose_pad_id(tokenizer, model.config.vocab_size)
    dtype = dtype_of(model)
    packing = settled_packing(config, model.config, compute_dtype=dtype).is_packed
    sequences = build_sequences(
        encoded.documents, config.max_length, packing=packing, pad_id=pad, seed=0
    )
    total, device = math.ceil(len(sequences) / (batch_size * world.size)), choice.device

    def batches() -> Iterator[Batch]:
        for done, batch in enumerate(ordered_batches(sequences, batch_size, device, world.share)):
            on_progress(done, total)
            yield batch

    what = "the losses of all processes"
    return evaluate(model, batches(), loss_for(model), choice.autocast, world, what)


def score(loss: float, answers: Sequence[Answer], metrics: Sequence[str] = ("auto",)) -> Scores:
    """Return the loss with the metrics of `answers`; auto computes those that fit them.

    Exact matches, valid JSON and its fields are counted where they can be, whatever is named.
    Raises DependencyError if a package that `metrics` need is missing.
    """
    perplexity = math.exp(min(loss, 700.0))  # exp overflows a float above 709
    if not answers:
        return Scores(loss, perplexity)
    texts = [answer.scored for answer in answers]
    references = [answer.reference for answer in answers]
    chosen = choose_metrics(metrics, references)
    fields = count_fields(texts, references)
    is_json = all(parse_json(reference) is not None for reference in references)
    overlaps = rouge_l(texts, references) if "rouge-l" in chosen else None
    return Scores(
        loss,
        perplexity,
        len(answers),
        n_fields=fields.n_fields if fields else None,
        valid_json=sum(parse_json(text) is not None for text in texts) if is_json else None,
        fields_right=fields.n_right if fields else None,
        field_accuracy=fields.accuracy if fields else None,
        exact_match=sum(answer.is_exact for answer in answers),
        classification=classify(texts, references) if "classification" in chosen else None,
        rouge_l=sum(overlaps) / len(overlaps) if overlaps else None,
        bleu=corpus_bleu(texts, references) if "bleu" in chosen else None,
        n_cut_answers=sum(answer.is_cut for answer in answers),
    )


def wrong_fields(answer: Answer) -> list[str]:
    """Return the fields of a JSON reference that the answer lacks or gives another value."""
    found = right_fields(answer.scored, answer.reference)
    return [name for name, is_right in found.items() if not is_right]
