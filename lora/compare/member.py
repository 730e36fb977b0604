"""The members of a comparison of real models, each in its own process: trained, saved, measured.

What is measured afterwards is measured on what was saved: the adapter on the base, or the whole
model, loaded anew as a user loads it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora.adapters.save_load import load_adapter
from lora.compare.record import MemberResult, Method, ModelEvaluation, RateTrial, Sample
from lora.compare.target import BaseResult, TrainingOutcome, short_run
from lora.config import RunConfig, SamplingConfig, TrainConfig
from lora.data.prepare import PreparedData
from lora.data.reading.embedded import prose
from lora.data.reading.formats import Example, example_from_row
from lora.data.reading.readers import read_examples
from lora.data.sequences.batches import ordered_batches
from lora.data.tokenizers.subword import TextTokenizer, load_tokenizer
from lora.decoder.decoder import Decoder
from lora.device import DeviceChoice, choose_device
from lora.errors import DataError
from lora.finetune.job import FinetuneJob
from lora.finetune.run import check_data, finetune
from lora.inference.evaluation import answer_examples, measure_loss, score
from lora.inference.generate import generate
from lora.inference.samples import choose_prompts
from lora.lora_module import count_lora_parameters
from lora.pretrained.hf_weights import load_decoder
from lora.pretrained.sources import find_model
from lora.runs.progress import NoProgress, Progress
from lora.runs.read_record import measured_peak, stored_bytes
from lora.sweep.grid import Grid
from lora.sweep.job import SweepJob
from lora.sweep.ledger import CandidateState, rank
from lora.sweep.run import sweep
from lora.training.losses import loss_for
from lora.training.plain_step import evaluate

if TYPE_CHECKING:
    from lora.compare.decoder_target import DecoderTarget

FORGETTING_CHARACTERS = 20_000
"""Of the built-in prose: about five thousand tokens."""
METRIC_NAMES = {"exact-match": "exact match", "json-fields": "JSON fields"}


def measure_base(
    target: DecoderTarget, train: TrainConfig, run: RunConfig, progress: Progress
) -> BaseResult:
    """Measure the base, which is also where data and settings are found to fit."""
    job = _job(target, "lora", train, run, resume=False)
    choice = choose_device(run.device, train.precision)
    source = find_model(target.model)
    data, report = check_data(job, source.folder, progress)
    for told in report.notes + report.warnings:
        progress.message(f"note: {told}")
    if data.validation is None:
        raise DataError(
            "A comparison measures held-out loss, and nothing is held out: give more examples, "
            "--eval-data, or an --eval-fraction above 0."
        )
    progress.message(f"{source.name} on {choice.reason}")
    model = load_decoder(source.folder, device=choice.device).eval()
    loss = _held_out_loss(model, data, train, choice)
    progress.message(f"held-out loss of the base: {loss:.4f}")
    measured = _measure(target, run, model, data.tokenizer, data, choice, progress)
    return BaseResult(source.name, choice.reason, loss, measured)


def run_member(
    target: DecoderTarget,
    method: Method,
    train: TrainConfig,
    run: RunConfig,
    resume: bool,
    measures: bool,
    progress: Progress,
) -> MemberResult:
    """Train a member as `lora finetune` does (PEFT's as its users do), and measure it as saved."""
    if method == "peft":
        from lora.compare.peft import train_peft

        outcome = train_peft(target, train, run, resume, progress)
    else:
        outcome = _finetune(target, method, train, run, resume, progress)
    choice = choose_device(run.device, train.precision)
    after, parameters = ModelEvaluation(), (0, 0)
    if measures:
        model, tokenizer, parameters = _load_saved(target, method, outcome.saved, choice)
        job = _job(target, method, train, run, resume=True)  # with the date of the run
        data, _ = check_data(job, find_model(target.model).folder, NoProgress())
        after = _measure(target, run, model, tokenizer, data, choice, progress)
    return MemberResult(
        steps=outcome.steps,
        train_s=outcome.train_s,
        peak_memory_bytes=measured_peak(outcome.folder, outcome.peak_memory_bytes),
        planned_memory_bytes=outcome.planned_memory_bytes,
        trainable_parameters=parameters[0],
        total_parameters=parameters[1],
        stored_bytes=stored_bytes(outcome.saved),
        final_eval_loss=outcome.eval_loss,
        best_eval_loss=outcome.best_eval_loss,
        after=after,
    )


def run_stacked_rate_trials(
    target: DecoderTarget,
    rates: tuple[float, ...],
    train: TrainConfig,
    run: RunConfig,
    progress: Progress,
) -> list[RateTrial]:
    """Return the held-out loss of LoRA at each rate: candidates of one sweep, which is kept."""
    lora = target.lora
    name = "lora"
    resume = (run.out / name / "run.json").is_file()
    if not resume:
        shutil.rmtree(run.out / name, ignore_errors=True)
    job = SweepJob(
        data=target.data,
        grid=Grid(
            rank=(lora.rank,),
            learning_rate=rates,
            alpha=(lora.alpha,),
            dropout=(lora.dropout,),
            seed=(train.seed,),
            schedule=(train.schedule,),
        ),
        model=target.model,
        eval_data=target.eval_data,
        lora=lora,
        train=train,
        data_config=target.data_config,
        run=short_run(run, name, train.steps),
        resume=resume,
    )
    states = sweep(job, _SweepProgressBridge(progress, train.steps)).candidates
    losses = {s.settings["learning_rate"]: s.eval_loss for s in states if s.status == "done"}
    return [RateTrial(rate, losses.get(rate)) for rate in rates]


def _finetune(
    target: DecoderTarget,
    method: Method,
    train: TrainConfig,
    run: RunConfig,
    resume: bool,
    progress: Progress,
) -> TrainingOutcome:
    done = finetune(_job(target, method, train, run, resume=resume), progress)
    result = done.result
    return TrainingOutcome(
        folder=done.folder,
        saved=done.saved,
        steps=result.steps,
        train_s=result.train_s,
        peak_memory_bytes=result.peak_memory_bytes,
        planned_memory_bytes=done.memory.plan.total,
        eval_loss=result.eval_loss,
        best_eval_loss=result.best_eval_loss,
    )


def _job(
    target: DecoderTarget, method: Method, train: TrainConfig, run: RunConfig, *, resume: bool
) -> FinetuneJob:
    """Return the member as `lora finetune` is asked for it; it answers no prompts on the way."""
    return FinetuneJob(
        data=target.data,
        model=target.model,
        eval_data=target.eval_data,
        lora=None if method == "full" else target.lora,
        train=train,
        data_config=target.data_config,
        run=replace(run, samples=0),
        resume=resume,
    )


def _load_saved(
    target: DecoderTarget, method: Method, saved: Path, choice: DeviceChoice
) -> tuple[Decoder, TextTokenizer, tuple[int, int]]:
    """Return what was saved, ready to answer, and how many parameters trained and are there."""
    if method == "full":
        model = load_decoder(saved, device=choice.device)
        n_parameters = sum(p.numel() for p in model.parameters())
        parameters = n_parameters, n_parameters
    else:
        model = load_decoder(find_model(target.model).folder, device=choice.device)
        load_adapter(model, saved, trainable=True)
        counts = count_lora_parameters(model)
        parameters = counts.trainable, counts.total
    return model.requires_grad_(False).eval(), load_tokenizer(saved), parameters


def _held_out_loss(
    model: Decoder, data: PreparedData, train: TrainConfig, choice: DeviceChoice
) -> float:
    assert data.validation is not None
    rows = train.micro_batch_size
    batches = ordered_batches(data.validation, rows, choice.device)
    return evaluate(model, batches, loss_for(model), choice.autocast)


def _measure(
    target: DecoderTarget,
    run: RunConfig,
    model: Decoder,
    tokenizer: TextTokenizer,
    data: PreparedData,
    choice: DeviceChoice,
    progress: Progress,
) -> ModelEvaluation:
    """Return forgetting, the metric and a few answers of `model`."""
    measures = target.measures
    name, examples = _forgetting_text(measures.forgetting_data)
    config = replace(target.data_config, long_examples="split", special_tokens=())
    loss = measure_loss(model, examples, tokenizer, config, choice)
    progress.message(f"loss on {name}: {loss:.4f}")
    metric_name = metric = None
    if measures.metric != "none":
        metric_name = METRIC_NAMES[measures.metric]
        metric = _score(target, model, tokenizer, data)
        progress.message(f"{metric_name}: {metric:.3f}")
    samples = _answer(target, run, model, tokenizer, data)
    return ModelEvaluation(name, loss, metric_name, metric, samples)


def _forgetting_text(source: Any) -> tuple[str, list[Example]]:
    """Return the name and the examples of the text that is not learned."""
    if source is None:
        corpus = prose()
        row = {"text": corpus.validation[:FORGETTING_CHARACTERS]}
        return corpus.described, [example_from_row(row, "the built-in prose")]
    name = str(source) if isinstance(source, str | Path) else "rows given in Python"
    return name, read_examples(source)


def _score(
    target: DecoderTarget, model: Decoder, tokenizer: TextTokenizer, data: PreparedData
) -> float:
    """Return the share of answers, or of their fields, that are right. Raises DataError if none is
    asked."""
    measures = target.measures
    examples = data.validation_examples
    if measures.test_data is not None:
        examples = read_examples(measures.test_data)
    sampling = SamplingConfig(max_new_tokens=measures.answer_tokens)
    answers = answer_examples(model, examples[: measures.answers], tokenizer, sampling)
    found = score(0.0, answers)
    if not found.n_answers or found.exact_match is None:
        raise DataError(
            f"metric={measures.metric!r} was asked for, and none of the examples asks anything: "
            "they are plain texts. Give --test-data with questions, or leave the metric out."
        )
    if measures.metric == "exact-match":
        return found.exact_match / found.n_answers
    if found.fields_right is None or not found.n_fields:
        raise DataError(
            "metric='json-fields' was asked for, and not every reference answer is a JSON object. "
            "Use --metric exact-match."
        )
    return found.fields_right / found.n_fields


def _answer(
    target: DecoderTarget,
    run: RunConfig,
    model: Decoder,
    tokenizer: TextTokenizer,
    data: PreparedData,
) -> tuple[Sample, ...]:
    room_tokens = model.config.max_position_embeddings - run.sample_tokens
    prompts = choose_prompts(
        data.validation_examples,
        tokenizer,
        run.samples,
        most_tokens=min(target.data_config.max_length, room_tokens),
        now=data.now,
    )
    if not prompts:
        return ()
    sampling = SamplingConfig(max_new_tokens=run.sample_tokens)
    ids = [prompt.ids for prompt in prompts]
    answers = generate(model, ids, sampling, stop_ids=tokenizer.stop_ids)
    return tuple(
        Sample(prompt.text, prompt.reference, tokenizer.decode(tokens))
        for prompt, tokens in zip(prompts, answers, strict=True)
    )


class _SweepProgressBridge:
    """A sweep's progress, told as a run's."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self._progress, self._steps = progress, steps

    def start(self, names: Sequence[str]) -> None:
        self._progress.start(self._steps, 0)

    def step(self, title: str, states: Sequence[CandidateState]) -> None:
        going = [s for s in states if s.status == "training" and s.loss is not None]
        least = min((s.loss for s in going if s.loss is not None), default=0.0)
        self._progress.step(max((s.step for s in going), default=0), least, 0.0, 0)

    def evaluated(self, title: str, states: Sequence[CandidateState]) -> None:
        leader = rank(states)[0]
        if leader.eval_loss is not None:
            loss = f"held-out loss {leader.eval_loss:.4f}"
            self._progress.message(f"best so far: {leader.name}, {loss}")

    def message(self, message: str) -> None:
        self._progress.message(message)

    def stop(self) -> None:
        self._progress.stop()
