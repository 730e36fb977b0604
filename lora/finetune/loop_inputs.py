"""Inputs of the training loop for a pretrained model: batches, samples, names of examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lora.config import TrainConfig
from lora.data.prepare import PreparedData
from lora.data.sequences.batches import BatchStream, ordered_batches
from lora.decoder.decoder import Decoder
from lora.device import DeviceChoice
from lora.finetune.job import FinetuneJob
from lora.finetune.outline import tokens_per_step
from lora.inference.samples import SampleRecorder, choose_prompts
from lora.runs.directory import Run
from lora.runs.progress import Progress
from lora.training.callbacks import Callback
from lora.training.job import TrainingJob
from lora.training.out_of_memory import MemoryParts
from lora.training.step_runner import StepRunner

MAX_NAMED = 8
"""Examples named in the message on a step that is not finite."""


def training_job(
    job: FinetuneJob,
    model: Decoder,
    data: PreparedData,
    choice: DeviceChoice,
    train: TrainConfig,
    run: Run,
    progress: Progress,
    steps: StepRunner,
    memory_plan: MemoryParts,
    callbacks: Sequence[Callback],
) -> TrainingJob:
    """Return the loop's inputs; `train` is the job's, its learning rate resolved."""
    batch_size, validation = train.micro_batch_size, data.validation
    stream = BatchStream(data.train, batch_size, train.seed, steps.batch_device)
    return TrainingJob(
        model=model,
        steps=steps,
        stream=stream,
        eval_batches=lambda: (
            [] if validation is None else ordered_batches(validation, batch_size, choice.device)
        ),
        train_config=train,
        run_config=job.run,
        run=run,
        choice=choice,
        progress=progress,
        on_eval=_sampler(job, model, data, run, progress),
        name_examples=example_namer(stream, data, train),
        resume=job.resume,
        memory_plan=memory_plan,
        tokens_per_step=tokens_per_step(data.train, train.batch_size),
        start_name=_start_name(job),
        callbacks=callbacks,
    )


def _start_name(job: FinetuneJob) -> str:
    """Return in words what the run starts from."""
    if job.from_adapter is not None:
        return "the adapter that training continued from"
    return "the model before fine-tuning" if job.is_full else "the model without an adapter"


def example_namer(
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


def _sampler(
    job: FinetuneJob, model: Decoder, data: PreparedData, run: Run, progress: Progress
) -> SampleRecorder:
    room_tokens = model.config.max_position_embeddings - job.run.sample_tokens
    prompts = choose_prompts(
        data.validation_examples,
        data.tokenizer,
        job.run.samples,
        max_tokens=min(job.data_config.max_length, room_tokens),
        now=data.now,
    )
    return SampleRecorder(model, prompts, data.tokenizer, run, progress, job.run.sample_tokens)
