"""The members of a comparison of pretrained models: trained, saved, and evaluated as saved.

Each member runs in a subprocess. What follows its training is measured on what it saved: the
adapter on the base, or the whole model, loaded again as a user loads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from lora.adapters.save_load import load_adapter
from lora.compare.decoder_job import DecoderJob
from lora.compare.evaluation import Evaluator
from lora.compare.results import BaseResult, MemberResult, ModelEvaluation
from lora.compare.target import MemberTask, TrainingOutcome, short_run
from lora.compare.together import agreed, is_begun
from lora.config import ImplementationName, RunConfig, TrainConfig
from lora.data.prepare import PreparedData
from lora.data.sequences.batches import ordered_batches
from lora.data.tokenizers.subword import TextTokenizer, load_tokenizer
from lora.decoder.language_model import LanguageModel
from lora.device import DeviceChoice, choose_device
from lora.distributed.devices import own_device
from lora.distributed.start import joined
from lora.distributed.world import World
from lora.errors import DataError
from lora.finetune.load_data import load_data
from lora.finetune.run import finetune
from lora.lora_module import count_lora_parameters
from lora.pretrained.load.models import load_language_model, model_config
from lora.pretrained.load.task import check_native_only, settled_task
from lora.pretrained.sources import find_model
from lora.runs.comparison_record import RateTrial
from lora.runs.progress import NoProgress, Progress
from lora.runs.read_record import measured_peak, stored_bytes
from lora.runs.record import Method
from lora.runs.sweep_record import CandidateState, rank
from lora.sweep.grid import Grid
from lora.sweep.job import SweepJob
from lora.sweep.run import sweep
from lora.training.losses import loss_for
from lora.training.plain_step import evaluate


def measure_base(
    job: DecoderJob, train: TrainConfig, run: RunConfig, progress: Progress
) -> BaseResult:
    """Evaluate the base model. What does not fit, of data or settings, is found here, first."""
    choice = choose_device(own_device(run.device), train.precision)
    with joined(choice.device) as world:
        return _measure_base(job, train, run, progress, choice, world)


def _measure_base(
    job: DecoderJob,
    train: TrainConfig,
    run: RunConfig,
    progress: Progress,
    choice: DeviceChoice,
    world: World,
) -> BaseResult:
    source = find_model(job.model)
    given = job.finetune_job(MemberTask("lora", train, run))
    dtype = choice.compute_dtype
    finetune_job = settled_task(given, source.folder, None, progress.message, dtype)
    sizes = model_config(source.folder, finetune_job.implementation)
    check_native_only(sizes, base=job.base_weights, fsdp=False)
    data, report = load_data(finetune_job, source.folder, progress, world)
    for note in report.notes + report.warnings:
        progress.message(f"note: {note}")
    if data.validation is None:
        raise DataError(
            "Cannot compare without validation data: nothing is held out from training. Give more "
            "examples, --eval-data, or an --eval-fraction above 0."
        )
    progress.message(f"{source.description} on {choice.reason}")
    model = load_language_model(
        source.folder, implementation=finetune_job.implementation, device=choice.device
    ).eval()
    loss = _validation_loss(model, data, train, choice, world)
    progress.message(f"validation loss of the base: {loss:.4f}")
    measured = Evaluator(job, run, data, choice, progress, world).evaluate(model, data.tokenizer)
    quantised_loss = None
    if job.base_weights.is_quantised:
        del model  # before the same weights are read a second time
        model = _load_base(job, source.folder, finetune_job.implementation, choice).eval()
        quantised_loss = _validation_loss(model, data, train, choice, world)
        progress.message(f"validation loss of the base in {job.base_dtype}: {quantised_loss:.4f}")
    return BaseResult(
        source.name,
        choice.reason,
        loss,
        measured,
        n_sequences=len(data.train),
        implementation=finetune_job.implementation,
        quantised_eval_loss=quantised_loss,
    )


def _load_base(
    job: DecoderJob, folder: Path, implementation: ImplementationName, choice: DeviceChoice
) -> LanguageModel:
    """Return the base as LoRA's members store it, from the values that they quantise."""
    return load_language_model(
        folder,
        implementation=implementation,
        dtype=choice.compute_dtype if job.base_weights.is_quantised else torch.float32,
        device=choice.device,
        base=job.base_weights,
    )


def run_member(job: DecoderJob, task: MemberTask, progress: Progress) -> MemberResult:
    """Train a member as `lora finetune` (or as a user of PEFT) does, and evaluate what it saved."""
    if task.method == "peft":
        from lora.compare.peft import train_peft

        outcome = train_peft(job, task, progress)
    else:
        outcome = _finetune(job, task, progress)
    after, parameters = ModelEvaluation(), (0, 0)
    if task.evaluate:
        choice = choose_device(own_device(task.run.device), task.train.precision)
        with joined(choice.device) as world:
            model, tokenizer, parameters = _load_saved(job, task.method, outcome.saved, choice)
            # As resumed: the chat template gets the date on which the run began.
            folder = find_model(job.model).folder
            begun = job.finetune_job(replace(task, resume=True))
            begun = settled_task(begun, folder, None, lambda message: None, choice.compute_dtype)
            data, _ = load_data(begun, folder, NoProgress(), world)
            evaluator = Evaluator(job, task.run, data, choice, progress, world)
            after = evaluator.evaluate(model, tokenizer)
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
        saved_step=outcome.saved_step,
        saved_eval_loss=outcome.saved_eval_loss,
    )


def run_stacked_rate_trials(
    job: DecoderJob, task: MemberTask, rates: tuple[float, ...], progress: Progress
) -> list[RateTrial]:
    """Return LoRA's validation loss at each learning rate: candidates of one sweep, which stays."""
    lora, train = job.lora, task.train
    name = "lora"
    resume = agreed(partial(is_begun, task.run.out / name), "the trials of an earlier call")
    sweep_job = SweepJob(
        data=job.data,
        grid=Grid(
            rank=(lora.rank,),
            learning_rate=rates,
            alpha=(lora.alpha,),
            dropout=(lora.dropout,),
            seed=(train.seed,),
            schedule=(train.schedule,),
        ),
        model=job.model,
        implementation=job.implementation,
        eval_data=job.eval_data,
        lora=lora,
        train=train,
        data_config=job.data_config,
        run=short_run(task.run, name, train.n_steps),
        resume=resume,
        **job.base_settings,
    )
    states = sweep(sweep_job, _SweepProgressBridge(progress, train.n_steps)).candidates
    losses = {s.settings["learning_rate"]: s.eval_loss for s in states if s.status == "done"}
    return [RateTrial(rate, losses.get(rate)) for rate in rates]


def _finetune(job: DecoderJob, task: MemberTask, progress: Progress) -> TrainingOutcome:
    done = finetune(job.finetune_job(task), progress)
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
        saved_step=result.saved_step,
        saved_eval_loss=result.saved_eval_loss,
    )


def _load_saved(
    job: DecoderJob, method: Method, saved: Path, choice: DeviceChoice
) -> tuple[LanguageModel, TextTokenizer, tuple[int, int]]:
    """Return the saved model ready for inference, and its trainable and total parameters."""
    if method == "full":
        model = load_language_model(saved, implementation=job.implementation, device=choice.device)
        n_parameters = sum(p.numel() for p in model.parameters())
        parameters = n_parameters, n_parameters
    else:
        model = _load_base(job, find_model(job.model).folder, job.implementation, choice)
        load_adapter(model, saved, trainable=True)
        counts = count_lora_parameters(model)
        parameters = counts.trainable, counts.total
    return model.requires_grad_(False).eval(), load_tokenizer(saved), parameters


def _validation_loss(
    model: LanguageModel, data: PreparedData, train: TrainConfig, choice: DeviceChoice, world: World
) -> float:
    assert data.validation is not None
    size = world.share.largest(train.micro_batch_size)
    batches = ordered_batches(data.validation, size, choice.device, world.share)
    return evaluate(model, batches, loss_for(model), choice.autocast, world)


class _SweepProgressBridge:
    """A sweep's progress, shown as that of a single run."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self._progress, self._steps = progress, steps

    def start(self, names: Sequence[str]) -> None:
        self._progress.start(self._steps, 0)

    def step(self, title: str, states: Sequence[CandidateState]) -> None:
        training = [s for s in states if s.status == "training" and s.loss is not None]
        lowest = min((s.loss for s in training if s.loss is not None), default=0.0)
        self._progress.step(max((s.step for s in training), default=0), lowest, 0.0, 0)

    def evaluated(self, title: str, states: Sequence[CandidateState]) -> None:
        leader = rank(states)[0]
        if leader.eval_loss is not None:
            self._progress.message(
                f"best so far: {leader.name}, validation loss {leader.eval_loss:.4f}"
            )

    def message(self, message: str) -> None:
        self._progress.message(message)

    def stop(self) -> None:
        self._progress.stop()
