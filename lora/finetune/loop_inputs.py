"""What a run on a real model gives the loop: batches, answers meanwhile, names of examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora.config import TrainConfig
from lora.data.prepare import PreparedData
from lora.data.sequences.batches import BatchStream, ordered_batches
from lora.decoder.decoder import Decoder
from lora.device import DeviceChoice
from lora.errors import DependencyError
from lora.finetune.job import FinetuneJob
from lora.inference.samples import SampleRecorder, choose_prompts
from lora.runs.directory import Run
from lora.runs.progress import Progress
from lora.training.losses import loss_for
from lora.training.step_runner import StepRunner
from lora.training.trainer import TrainingJob

MAX_NAMED = 8
"""Examples that a message on a step that is not finite names."""


def training_job(
    job: FinetuneJob,
    model: Decoder,
    data: PreparedData,
    choice: DeviceChoice,
    rate: float,
    run: Run,
    progress: Progress,
    steps: StepRunner | None,
) -> TrainingJob:
    """Return what the loop takes; `steps`: None for the plain step."""
    rows = job.train.micro_batch_size
    held_out = data.validation
    # The fast step copies batches to the device by itself.
    place = choice.device if steps is None else "cpu"
    stream = BatchStream(data.train, rows, job.train.seed, place)
    return TrainingJob(
        model=model,
        loss_fn=loss_for(model),
        stream=stream,
        eval_batches=lambda: (
            [] if held_out is None else ordered_batches(held_out, rows, choice.device)
        ),
        train_config=job.train,
        learning_rate=rate,
        run_config=job.run,
        run=run,
        choice=choice,
        progress=progress,
        on_eval=_sampler(job, model, data, run, progress),
        name_examples=_namer(stream, data, job.train),
        resume=job.resume,
        steps=steps,
    )


def _namer(
    stream: BatchStream, data: PreparedData, train: TrainConfig
) -> Callable[[int, Sequence[tuple[int, int]]], str]:
    """Return what names the examples in rows of a step: see `TrainingJob.name_examples`."""
    rows = train.micro_batch_size

    def name(step: int, places: Sequence[tuple[int, int]]) -> str:
        chosen = [micro * rows + row for micro, row in places] or range(train.batch_size)
        drawn = stream.sequence_indices((step - 1) * train.batch_size + n for n in chosen)
        sources = [data.train_examples[i].source for i in data.train.example_indices(drawn)]
        more = f" and {len(sources) - MAX_NAMED} more" if len(sources) > MAX_NAMED else ""
        return f"Read there: {', '.join(sources[:MAX_NAMED])}{more}."

    return name


def _sampler(
    job: FinetuneJob, model: Decoder, data: PreparedData, run: Run, progress: Progress
) -> SampleRecorder:
    room_tokens = model.config.max_position_embeddings - job.run.sample_tokens
    prompts = choose_prompts(
        data.validation_examples,
        data.tokenizer,
        job.run.samples,
        most_tokens=min(job.data_config.max_length, room_tokens),
        now=data.now,
    )
    return SampleRecorder(model, prompts, data.tokenizer, run, progress, job.run.sample_tokens)


def find_tensorboard() -> Callable[[Path], Callable[[dict[str, Any]], None]]:
    """Return what opens event files in a folder and gives back where rows of metrics go."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise DependencyError(
            "tensorboard=True was asked for: tensorboard is not installed. "
            "Run: pip install 'lora-lm[track]'"
        ) from None

    def open_board(folder: Path) -> Callable[[dict[str, Any]], None]:
        writer = SummaryWriter(str(folder), flush_secs=10)

        def write(row: dict[str, Any]) -> None:
            for name in row.keys() - {"step"}:
                writer.add_scalar(name, row[name], row["step"])

        return write

    return open_board
