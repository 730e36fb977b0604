"""What a run will do, in one block for the user: data, length, tokens, memory and time."""

from __future__ import annotations

import statistics

from lora.config import DEFAULT_EPOCHS, DEFAULT_STEPS, TrainConfig
from lora.data.prepare import PreparedData
from lora.data.sequences.batches import TokenSequences
from lora.device import WHOLE, Share
from lora.errors import CheckpointError
from lora.fast.memory.plan import MemoryPlan
from lora.finetune.job import FinetuneJob
from lora.finetune.memory import describe_plan
from lora.runs.progress import duration_text
from lora.runs.read_record import read_metrics, step_times


def tokens_per_step(sequences: TokenSequences, batch_size: int) -> float:
    """Return the tokens of a step without padding, learned or not: the mean over an epoch."""
    return batch_size * len(sequences.documents.ids) / max(1, len(sequences))


def outline(
    job: FinetuneJob,
    given: TrainConfig,
    data: PreparedData,
    plan: MemoryPlan,
    share: Share = WHOLE,
) -> str:
    """Return the block; `job` has its number of steps, `given` what the user gave.

    `share` is this process's part of a micro-batch.
    """
    train, sequences = job.train, data.train
    n_tokens = train.n_steps * tokens_per_step(sequences, train.batch_size)
    learned = sequences.n_target_tokens / max(1, len(sequences.documents.ids))
    packed = "packed sequences" if job.data_config.is_packed else "sequences"
    lines = [
        f"examples: {len(data.train_examples):,} for training, "
        f"{len(data.validation_examples):,} for validation",
        f"{packed}: {len(sequences):,} of {sequences.sequence_length:,} tokens, "
        f"{sequences.fill_fraction:.0%} filled",
        f"length: {_describe_length(train, given, len(sequences))}",
        f"tokens: {n_tokens:,.0f} in all steps, {learned:.0%} of them learned",
        *_describe_share(train, share),
        describe_plan(plan),
        f"time: {_estimate_time(job)}",
    ]
    times_all = train.batch_size / len(sequences)
    if times_all >= 2:
        lines.append(
            f"note: every step has all {len(sequences)} sequences {times_all:.0f} times: a smaller "
            "--batch-size or --max-length takes less time"
        )
    return "\n  ".join(["this run", *lines])


def _describe_share(train: TrainConfig, share: Share) -> list[str]:
    """Return how a micro-batch is shared, and what is lost where it cannot be shared evenly."""
    if share.size == 1:
        return []
    size, own = train.micro_batch_size, share.largest(train.micro_batch_size)
    text = f"processes: {share.size}, each with {own} of the {size} sequences of a micro-batch"
    if size % share.size:
        even = own * share.size * train.gradient_accumulation
        text += f" or fewer; --batch-size {even:,} takes no longer, because those are padded"
    return [text]


def _describe_length(train: TrainConfig, given: TrainConfig, n_sequences: int) -> str:
    text = train.describe_length(n_sequences)
    if given.steps is not None or given.epochs is not None:
        return text
    least, most = DEFAULT_STEPS
    return (
        f"{text} (by default {DEFAULT_EPOCHS:g} epochs, in {least:,} to {most:,} steps; set "
        "--epochs or --steps)"
    )


def _estimate_time(job: FinetuneJob) -> str:
    """Return how long the steps will take, from those that a resumed run has taken."""
    if not job.resume:
        return "known after the first steps"
    try:
        step_s = statistics.median(step_times(job.directory))
        done = max((row.step for row in read_metrics(job.directory)), default=0)
    except CheckpointError:  # it was stopped before its first step
        return "known after the first steps"
    left = max(0, job.train.n_steps - done)
    return f"about {duration_text(left * step_s)} for {left:,} more steps, as fast as before"
