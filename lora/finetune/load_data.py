"""The data of a finetune job: read, encoded and inspected before any weights are loaded."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from lora.data.inspection import inspect_prepared
from lora.data.inspection_report import DataReport
from lora.data.prepare import PreparedData, prepare_data
from lora.data.tokenizers.subword import load_tokenizer
from lora.distributed.world import ALONE, World
from lora.finetune.job import FinetuneJob
from lora.inference.run_settings import find_prompt_format, prompts_to_resume
from lora.pretrained.load.models import model_config
from lora.pretrained.load.task import check_lengths
from lora.pretrained.positions import describe_excess
from lora.runs.directory import read_start_time
from lora.runs.progress import Progress
from lora.runs.record import PromptFormat


def load_data(
    job: FinetuneJob, model_folder: Path, progress: Progress, world: World = ALONE
) -> tuple[PreparedData, DataReport]:
    """Return the job's examples as token sequences, and the report on them.

    In a resumed run the chat template sees the date on which the run started, so that its sequences
    are the same; in several processes it sees rank 0's. Raises DataError if no example has a target
    token, ConfigError for sequences beyond the table of positions.
    """
    folder = _tokenizer_folder(job, model_folder)
    # An adapter with a tokenizer of its own brings rows for the tokens that it added.
    is_base, sizes = folder == model_folder, model_config(model_folder, job.implementation)
    data = prepare_data(
        job.data,
        load_tokenizer(folder),
        job.data_config,
        job.train.seed,
        validation_source=job.eval_data,
        now=world.on_main(lambda: _start_time(job, world), "the start time"),
        trained=world.on_main(lambda: _trained(job), "the prompts of the run"),
        n_rows=sizes.vocab_size if is_base else None,
        on_message=progress.message,
    )
    check_lengths(sizes, data)
    progress.message(
        f"{len(data.train_examples)} training examples ({data.train.n_target_tokens:,} target "
        f"tokens in {len(data.train)} sequences), {len(data.validation_examples)} for validation"
    )
    report = inspect_prepared(data, job.data, job.data_config)
    excess = describe_excess(report.longest_tokens, sizes.max_position_embeddings)
    report.warnings += [excess] if excess else []
    return data, report


def _start_time(job: FinetuneJob, world: World) -> datetime | None:
    known = read_start_time(job.directory) if job.resume else None
    return known if world.is_alone or known is not None else datetime.now()


def _trained(job: FinetuneJob) -> PromptFormat | None:
    """Return how the run or the adapter that is continued was prompted."""
    if job.resume:
        return prompts_to_resume(job.directory)
    return None if job.from_adapter is None else find_prompt_format(job.from_adapter)


def _tokenizer_folder(job: FinetuneJob, model_folder: Path) -> Path:
    """Return the directory of the tokenizer: an adapter with added tokens has its own."""
    own = job.from_adapter
    return own if own is not None and (own / "tokenizer.json").is_file() else model_folder
