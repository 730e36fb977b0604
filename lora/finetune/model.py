"""The model of a finetune job: loaded and prepared for training, and saved at the end."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from lora.adapters.added_tokens import add_tokens_to_all, add_tokens_to_lora
from lora.adapters.apply import apply_lora
from lora.adapters.fingerprint import base_fingerprint
from lora.adapters.peft_files import CONFIG_FILE
from lora.adapters.save_load import load_adapter, save_adapter
from lora.adapters.targets import text_part
from lora.data.prepare import PreparedData
from lora.data.prompting.prompt_format import save_prompt_format
from lora.data.tokenizers.subword import TextTokenizer
from lora.decoder.language_model import LanguageModel
from lora.decoder.quantised.storage import describe_storage
from lora.device import DeviceChoice
from lora.distributed.shards import ShardReader, gathered_tables
from lora.distributed.world import ALONE, World
from lora.errors import CheckpointError
from lora.finetune.job import FinetuneJob
from lora.inference.checkpoints.listing import CHECKPOINTS, START
from lora.pretrained.load.models import (
    load_language_model,
    save_language_model,
    write_sharded_model,
)
from lora.pretrained.model_files import save_tokenizer_files
from lora.pretrained.sources import ModelSource
from lora.runs.directory import Run
from lora.runs.progress import Progress


def load_model(
    job: FinetuneJob,
    source: ModelSource,
    choice: DeviceChoice,
    tokenizer: TextTokenizer,
    progress: Progress,
) -> tuple[LanguageModel, str]:
    """Return the model ready to train, and the fingerprint of its base. Sets torch's seed."""
    # Frozen weights are loaded in the compute dtype; with full fine-tuning they stay in fp32.
    wide = torch.promote_types(choice.compute_dtype, torch.float32)
    dtype = wide if job.is_full else choice.compute_dtype
    model = load_language_model(
        source.folder,
        implementation=job.implementation,
        dtype=dtype,
        device=choice.device,
        base=job.base_weights,
    )
    fingerprint = base_fingerprint(model)
    tell_storage(model, progress)
    prepare_model(job, model, tokenizer, progress)
    return model, fingerprint


def tell_storage(model: LanguageModel, progress: Progress) -> None:
    """Say what of a quantised base is quantised, and what is not."""
    stored = describe_storage(model)
    if stored is not None:
        progress.message(stored)


def prepare_model(
    job: FinetuneJob, model: LanguageModel, tokenizer: TextTokenizer, progress: Progress
) -> None:
    """Changes the base `model` in place: LoRA and added tokens of `job`. Sets torch's seed."""
    if job.from_adapter is not None:
        load_adapter(model, job.from_adapter, trainable=True)
    elif job.lora is not None:
        seed = job.train.seed if job.lora.init_seed is None else job.lora.init_seed
        apply_lora(model, replace(job.lora, init_seed=seed))
    add_tokens = add_tokens_to_all if job.is_full else add_tokens_to_lora
    note = add_tokens(model, tokenizer, job.data_config.special_tokens)
    if note is not None:
        progress.message(note)
    if job.is_full:
        _train_all(model)
    torch.manual_seed(
        job.train.seed
    )  # dropout's draws depend on this seed alone, not on what loading drew


def _train_all(model: LanguageModel) -> None:
    """Changes `model` in place: its weights train; of a multimodal one those of the text part."""
    part = text_part(model)
    model.requires_grad_(not part)
    if part:
        tables = (model.get_input_embeddings(), model.get_output_embeddings())
        for module in (model.get_submodule(part.rstrip(".")), *tables):
            module.requires_grad_(True)


def save_model(
    job: FinetuneJob,
    model: LanguageModel,
    data: PreparedData,
    source: ModelSource,
    run: Run,
    progress: Progress,
    world: World = ALONE,
) -> Path:
    """Save the adapter, or the whole model after full fine-tuning; return its directory.

    It is in the run directory, or in a new temporary one if that cannot be written. Rank 0 writes
    it; of a sharded model it has no more than parts of one tensor at a time.
    """
    if not job.is_full:
        save = partial(_save_adapter, model, data, source)
        with gathered_tables(model):
            return world.on_main(
                lambda: save_in_run(run, "adapter", save, progress), "the final save"
            )
    reader = ShardReader.of_model(model, world) if model.is_sharded else None

    def save_all(directory: Path) -> None:
        if reader is None:
            save_language_model(model, directory)
        else:
            write_sharded_model(model, reader.read, directory)
        # With the chat template of the training data.
        save_tokenizer_files(data.tokenizer, source.folder, directory)
        save_prompt_format(data.prompts, directory)

    on_main = world.on_main if reader is None else reader.on_main
    return on_main(lambda: save_in_run(run, "model", save_all, progress), "the final save")


def save_in_run(run: Run, name: str, save: Callable[[Path], None], progress: Progress) -> Path:
    """Call `save` with the directory `name` of the run, and return it.

    If that cannot be written, with one in a new directory on another disk. Raises CheckpointError
    if there is none either.
    """
    directory = run.folder / name
    try:
        save(directory)
    except CheckpointError as error:  # do not lose hours of training to a full disk
        directory = _save_elsewhere(run, name, save, error)
        progress.message(f"{error} The {name} is saved in {directory}: copy it to a safe place.")
    return directory


def _save_elsewhere(
    run: Run, name: str, save: Callable[[Path], None], cause: CheckpointError
) -> Path:
    places = []
    for place in (tempfile.gettempdir, Path.cwd, Path.home, lambda: "/dev/shm"):
        try:
            places.append(str(place()))
            folder = Path(tempfile.mkdtemp(prefix=f"lora-{run.folder.name}-", dir=places[-1]))
        except (OSError, RuntimeError):  # no such directory, or no home
            continue
        try:
            save(folder / name)
            return folder / name
        except CheckpointError:
            shutil.rmtree(folder, ignore_errors=True)
    raise CheckpointError(
        f"{cause} The {name} could not be saved in {', '.join(dict.fromkeys(places))} either. Free "
        "some space, then resume the run: it saves what the newest checkpoint has."
    )


def save_start(
    job: FinetuneJob,
    model: LanguageModel,
    data: PreparedData,
    source: ModelSource,
    run: Run,
    progress: Progress,
) -> None:
    """Save the adapter as it is before training: see `save_start_in_run`."""
    if not job.is_full:
        save = partial(_save_adapter, model, data, source)
        save_start_in_run(run, save, progress)


def save_start_in_run(run: Run, save: Callable[[Path], None], progress: Progress) -> None:
    """Call `save` before training: what opens a checkpoint as an adapter is made after it.

    If the disk refuses, a message says so: checkpoints then open once the run has ended.
    """
    directory = run.folder / CHECKPOINTS / START
    if (directory / CONFIG_FILE).is_file():
        return
    try:
        save(directory)
    except CheckpointError as error:
        progress.message(
            f"{error} Checkpoints can be used as adapters only when the run has ended."
        )


def _save_adapter(
    model: LanguageModel, data: PreparedData, source: ModelSource, directory: Path
) -> None:
    save_adapter(model, directory, base_name=source.reference)
    data.tokenizer.save(directory)  # with the chat template of the training data
    save_prompt_format(data.prompts, directory)
