"""Evaluation of one model of a comparison: loss on another text, a metric, generated answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora.compare.decoder_job import DecoderJob
from lora.compare.results import ModelEvaluation
from lora.config import RunConfig, SamplingConfig
from lora.data.prepare import PreparedData
from lora.data.reading.embedded import prose
from lora.data.reading.formats import Example, example_from_row
from lora.data.reading.readers import Source, read_examples
from lora.data.tokenizers.subword import TextTokenizer
from lora.decoder.language_model import LanguageModel
from lora.device import DeviceChoice
from lora.distributed.world import ALONE, World
from lora.errors import DataError
from lora.inference.answers import answer_examples
from lora.inference.evaluation import measure_loss, score
from lora.inference.samples import choose_prompts
from lora.inference.shared import generate_shared
from lora.runs.comparison_record import Sample
from lora.runs.progress import Progress
from lora.runs.record import IN_MEMORY

FORGETTING_CHARACTERS = 20_000
"""Of the built-in prose: about five thousand tokens."""
METRIC_NAMES = {"exact-match": "exact match", "json-fields": "JSON fields"}


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the base and every member in the same way, on the same data."""

    job: DecoderJob
    run: RunConfig
    """Number and length of the samples."""
    data: PreparedData
    choice: DeviceChoice
    progress: Progress
    world: World = ALONE
    """The processes that share the evaluation."""

    def evaluate(self, model: LanguageModel, tokenizer: TextTokenizer) -> ModelEvaluation:
        """Return the loss on another text, the metric, and a few answers of `model`."""
        evaluation = self.job.evaluation
        name, examples = _forgetting_text(evaluation.forgetting_data)
        config = replace(self.job.data_config, long_examples="split", special_tokens=())
        loss = measure_loss(
            model, examples, tokenizer, config, self.choice, now=self.data.now, world=self.world
        )
        self.progress.message(f"loss on {name}: {loss:.4f}")
        metric_name = metric = None
        if evaluation.metric != "none":
            metric_name = METRIC_NAMES[evaluation.metric]
            metric = self._score(model, tokenizer)
            self.progress.message(f"{metric_name}: {metric:.3f}")
        samples = self._samples(model, tokenizer)
        return ModelEvaluation(name, loss, metric_name, metric, samples)

    def _score(self, model: LanguageModel, tokenizer: TextTokenizer) -> float:
        """Return the fraction of answers, or of JSON fields in them, that are right.

        Raises DataError if no example has a question, or a reference answer is not a JSON object.
        """
        evaluation = self.job.evaluation
        examples: Sequence[Example] = self.data.validation_examples
        if evaluation.test_data is not None:
            examples = read_examples(
                evaluation.test_data, self.progress.message, rules=self.data.rules, part="test"
            )
        sampling = SamplingConfig(max_new_tokens=evaluation.answer_tokens)
        chosen = examples[: evaluation.answers]
        answers = answer_examples(
            model, chosen, tokenizer, sampling, now=self.data.now, world=self.world
        )
        found = score(0.0, answers)
        if not found.n_answers or found.exact_match is None:
            raise DataError(
                f"Cannot compute metric={evaluation.metric!r}: the examples are plain texts, none "
                "has a question. Give --test-data with questions, or leave the metric out."
            )
        if evaluation.metric == "exact-match":
            return found.exact_match / found.n_answers
        if found.fields_right is None or not found.n_fields:
            raise DataError(
                "Cannot compute metric='json-fields': not every reference answer is a JSON object. "
                "Use --metric exact-match."
            )
        return found.fields_right / found.n_fields

    def _samples(self, model: LanguageModel, tokenizer: TextTokenizer) -> tuple[Sample, ...]:
        """Return greedy answers to a few validation prompts, the same ones for every model."""
        max_prompt_tokens = model.config.max_position_embeddings - self.run.sample_tokens
        prompts = choose_prompts(
            self.data.validation_examples,
            tokenizer,
            self.run.samples,
            max_tokens=min(self.job.data_config.max_length, max_prompt_tokens),
            now=self.data.now,
        )
        if not prompts:
            return ()
        sampling = SamplingConfig(max_new_tokens=self.run.sample_tokens)
        ids = [prompt.ids for prompt in prompts]
        stop_ids = tokenizer.stop_ids
        answers = generate_shared(model, ids, sampling, self.world, stop_ids=stop_ids)
        return tuple(
            Sample(
                prompt=prompt.text,
                expected=prompt.reference,
                answer=tokenizer.decode(tokens),
                is_cut=len(tokens) >= self.run.sample_tokens,
            )
            for prompt, tokens in zip(prompts, answers, strict=True)
        )


def _forgetting_text(source: Source | None) -> tuple[str, Sequence[Example]]:
    """Return the name and the examples of the text that is not trained on."""
    if source is None:
        corpus = prose()
        row = {"text": corpus.validation[:FORGETTING_CHARACTERS]}
        return corpus.described, [example_from_row(row, "the built-in prose")]
    name = str(source) if isinstance(source, str | Path) else IN_MEMORY
    return name, read_examples(source)
