"""Inputs of the training loop for a pretrained model: batches, samples, names of examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypedDict

from lora.config import TrainConfig
from lora.data.prepare import PreparedData
from lora.data.sequences.batches import Batch, BatchStream, ordered_batches
from lora.decoder.language_model import LanguageModel
from lora.device import DeviceChoice
from lora.distributed.world import ALONE, World
from lora.finetune.job import FinetuneJob
from lora.finetune.outline import tokens_per_step
from lora.inference.samples import SampleRecorder, choose_prompts
from lora.runs.directory import Run
from lora.runs.progress import Progress
from lora.runs.record import RunRecord
from lora.training.callbacks import Callback
from lora.training.job import TrainingJob
from lora.training.out_of_memory import MemoryParts
from lora.training.step_runner import StepRunner

MAX_NAMED = 8
"""Examples named in the message on a step that is not finite."""


class DataInputs(TypedDict):
    """The arguments of a `TrainingJob` that follow from its data."""

    stream: BatchStream
    eval_batches: Callable[[], Iterable[Batch]]
    name_examples: Callable[[int, Sequence[tuple[int, int]]], str]
    tokens_per_step: float


def data_inputs(
    data: PreparedData,
    train: TrainConfig,
    steps: StepRunner,
    choice: DeviceChoice,
    world: World = ALONE,
) -> DataInputs:
    """Return batches, names and sizes of `data`, trained with `steps`: this process's share."""
    size, validation, share = train.micro_batch_size, data.validation, world.share
    stream = BatchStream(data.train, size, train.seed, steps.batch_device, share)
    own_size = share.largest(size)
    return DataInputs(
        stream=stream,
        eval_batches=lambda: (
            []
            if validation is None
            else ordered_batches(validation, own_size, choice.device, share)
        ),
        name_examples=_example_namer(stream, data, train),
        tokens_per_step=tokens_per_step(data.train, train.batch_size),
    )


def training_job(
    job: FinetuneJob,
    model: LanguageModel,
    data: PreparedData,
    choice: DeviceChoice,
    train: TrainConfig,
    run: Run,
    progress: Progress,
    steps: StepRunner,
    memory_plan: MemoryParts,
    callbacks: Sequence[Callback],
    world: World = ALONE,
) -> TrainingJob:
    """Return the loop's inputs; `train` is the job's, its learning rate resolved."""
    return TrainingJob(
        **data_inputs(data, train, steps, choice, world),
        world=world,
        model=model,
        steps=steps,
        train_config=train,
        run_config=job.run,
        run=run,
        choice=choice,
        progress=progress,
        on_eval=(
            _sampler(job, model, data, run, progress, world if model.is_sharded else ALONE)
            if world.is_main or model.is_sharded
            else _no_samples
        ),
        resume=job.resume,
        memory_plan=memory_plan,
        start_name=_start_name(job),
        callbacks=callbacks,
    )


def alike_before(record: RunRecord, choice: DeviceChoice) -> dict[str, object]:
    """Return by name what must be the same in all processes before they plan or send weights."""
    named = ("base_fingerprint", "from_adapter_fingerprint", "base_dtype", "deterministic", "lora")
    more = ("implementation", "train", "data_config", "nf4")
    return {
        **{name: getattr(record, name) for name in (*named, *more)},
        "data": record.data.fingerprint,
        "validation data": record.data.held_out_fingerprint,
        "compute dtype": str(choice.compute_dtype),
    }


def alike_in_training(record: RunRecord, steps: StepRunner) -> dict[str, object]:
    """Return by name what must be the same in all processes when the model and its step are there.

    `record` is whole now.
    """
    return {
        **{name: getattr(record, name) for name in ("base_fingerprint", "train", "parallel")},
        "activation checkpointing": record.activation_checkpointing,
        "step": type(steps).__name__,
    }


def _start_name(job: FinetuneJob) -> str:
    """Return in words what the run starts from."""
    if job.from_adapter is not None:
        return "the adapter that training continued from"
    return "the model before fine-tuning" if job.is_full else "the model without an adapter"


def _example_namer(
    stream: BatchStream, data: PreparedData, train: TrainConfig
) -> Callable[[int, Sequence[tuple[int, int]]], str]:
    """Return the function that names the examples in a step: see `TrainingJob.name_examples`."""
    size = train.micro_batch_size

    def name(step: int, sequences: Sequence[tuple[int, int]]) -> str:
        chosen = [micro * size + index for micro, index in sequences] or range(train.batch_size)
        drawn = stream.sequence_indices((step - 1) * train.batch_size + n for n in chosen)
        sources = [data.train_examples[i].source for i in data.train.example_indices(drawn)]
        more = f" and {len(sources) - MAX_NAMED} more" if len(sources) > MAX_NAMED else ""
        return f"Examples there: {', '.join(sources[:MAX_NAMED])}{more}."

    return name


def _no_samples(step: int) -> None:
    """Sample nothing: rank 0 does."""


def _sampler(
    job: FinetuneJob,
    model: LanguageModel,
    data: PreparedData,
    run: Run,
    progress: Progress,
    together: World,
) -> SampleRecorder:
    room_tokens = model.config.max_position_embeddings - job.run.sample_tokens
    prompts = choose_prompts(
        data.validation_examples,
        data.tokenizer,
        job.run.samples,
        max_tokens=min(job.data_config.max_length, room_tokens),
        now=data.now,
    )
    n_tokens = job.run.sample_tokens
    return SampleRecorder(model, prompts, data.tokenizer, run, progress, n_tokens, together)
