"""`lora.train(...)`: our loop on a model that is in memory and has LoRA, one of transformers' too.

model = AutoModelForCausalLM.from_pretrained("my-model")
lora.apply_lora(model, lora.LoRAConfig(rank=16))
done = lora.train(model, AutoTokenizer.from_pretrained("my-model"), "orders.jsonl", steps=300)
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lora.adapters.apply import applied_lora, trained_parameters
from lora.adapters.bases.linears import weights_of
from lora.adapters.bases.quantisation import quantisation_of
from lora.adapters.fingerprint import base_fingerprint
from lora.adapters.save_load import save_adapter
from lora.config import DataConfig, RunConfig, TrainConfig
from lora.data.inspection import inspect_prepared
from lora.data.prepare import PreparedData, prepare_data
from lora.data.prompting.prompt_format import save_prompt_format
from lora.data.reading.readers import Source
from lora.data.record import describe_data
from lora.data.task import why_split_is_unused
from lora.data.tokenizers.subword import TextTokenizer, load_tokenizer
from lora.decoder.language_model import LanguageModel
from lora.decoder.quantised.base import dtype_of
from lora.device import DeviceChoice, choose_device
from lora.distributed.devices import check_batch, check_own_device
from lora.distributed.one_run import check_alike, resumes, shared_run
from lora.distributed.start import joined
from lora.distributed.tensors import broadcast_trained
from lora.distributed.world import World
from lora.errors import CheckpointError, ConfigError, ModelError, UnknownSettingError
from lora.fast.choose import choose_steps
from lora.finetune.event_files import check_tensorboard, event_file
from lora.finetune.loop_inputs import alike_before, alike_in_training, data_inputs
from lora.finetune.model import save_in_run, save_start_in_run
from lora.finetune.unused import check_patience, refuse_unused
from lora.inference.run_settings import prompts_to_resume
from lora.pretrained.load.task import settled_packing
from lora.pretrained.positions import check_positions, describe_excess
from lora.pretrained.transformers_models.load import as_language_model, is_transformers
from lora.runs.directory import (
    Run,
    check_run_directory,
    create_run,
    default_name,
    read_start_time,
)
from lora.runs.progress import NoProgress, Progress, as_progress
from lora.runs.read_record import recorded_packing, recorded_steps
from lora.runs.record import PromptFormat, RunRecord, RunResult
from lora.settings.base import by_names_of_today, describe_unknown, names_of
from lora.training.callbacks import Callback, Callbacks, as_callbacks
from lora.training.job import TrainingJob, TrainResult
from lora.training.trainer import train as run_loop

GROUPS = (TrainConfig, DataConfig, RunConfig)
NOT_HERE = {
    "device": "the model is used where it is: move it with model.to(...)",
    "parallel": "the model is whole in every process; lora.finetune(...) can shard one",
    "samples": "sample answers need a model of lora.load_model; ask it with its own generate()",
    "sample_tokens": "there are no sample answers here",
    "special_tokens": "add them to the model and the tokenizer first, with train_token_rows(model, "
    "ids)",
}
"""Settings that mean nothing for a model in memory, and why."""


@dataclass(frozen=True)
class TrainedAdapter:
    """Where the results are, and what was measured."""

    folder: Path
    """The run directory."""
    saved: Path
    """The directory of the adapter."""
    result: TrainResult


@dataclass(frozen=True)
class _Settings:
    train: TrainConfig
    data: DataConfig
    run: RunConfig


def train(
    model: nn.Module,
    tokenizer: Any,
    data: Source,
    progress: Progress | bool | None = None,
    *,
    eval_data: Source | None = None,
    resume: bool = False,
    callbacks: Callbacks = (),
    **settings: Any,
) -> TrainedAdapter:
    """Changes `model` in place: train the LoRA on it, and save the adapter in a run directory.

    The same loop as `lora.finetune`: evaluations, early stopping, checkpoints, exact resume.

        model = AutoModelForCausalLM.from_pretrained("my-model")
        tokenizer = AutoTokenizer.from_pretrained("my-model")
        lora.apply_lora(model, lora.LoRAConfig(rank=16))
        done = lora.train(model, tokenizer, "orders.jsonl", steps=300, name="orders")

        model = AutoModelForCausalLM.from_pretrained("my-model")    # later
        lora.load_adapter(model, done.saved)
        lora.merge_lora(model)
        model.save_pretrained("merged")

    Args:
        model: with LoRA (`apply_lora` or `load_adapter(..., trainable=True)`): one of transformers'
            causal language models, or one that `lora.load_model` returned. It stays on its device.
        tokenizer: the model's: of transformers (a fast one), of `lora.load_model`, or the directory
            of a tokenizer.json.
        data: a file or directory of examples, or a list of dicts.
        progress: True shows a bar and messages on standard error, None nothing; or what is called
            with them.
        eval_data: validation examples; None splits some off `data`.
        resume: continue the run called `name`; the model must be prepared as it was for that run.
        callbacks: a `lora.Callback`, or a list of them, called after steps, evaluations and saves.
        settings: fields of TrainConfig, DataConfig and RunConfig, by their names. Examples are
            packed by default where the model keeps them apart, which is tried first.

    Raises ConfigError, DataError, ModelError or TargetError before anything is written or trained;
    TrainingError if the loss is no longer finite; Interrupted after a signal.

    In a script that torchrun started, the processes train together; each has the model on its own
    GPU, and rank 0 writes, and has the progress and the callbacks.
    """
    progress, called = as_progress(progress, "train"), as_callbacks(callbacks)
    device = next(model.parameters()).device
    check_own_device(device)
    with joined(device) as world:
        if not world.is_main:
            progress, called = NoProgress(), ()
        return _train(model, tokenizer, data, progress, eval_data, resume, called, settings, world)


def _train(
    model: nn.Module,
    tokenizer: Any,
    data: Source,
    progress: Progress,
    eval_data: Source | None,
    resume: bool,
    called: Sequence[Callback],
    settings: dict[str, Any],
    world: World,
) -> TrainedAdapter:
    chosen = _take_settings(settings)
    _check_trains(model)
    shown, model = model, as_language_model(model)
    resume = resumes(chosen.run, resume, world, progress.message)
    if not resume:
        faults = why_split_is_unused(chosen.data, eval_data)
        refuse_unused(faults, chosen.train, trains_modules=_trains_modules(model))
    check_batch(chosen.train, world)
    out, given = chosen.run.out, chosen.run.name
    world.on_main(lambda: check_run_directory(out, given, resume=resume), "the run directory")
    if chosen.run.tensorboard:
        check_tensorboard()
    choice = choose_device(str(next(model.parameters()).device), chosen.train.precision)
    recorded = world.on_main(lambda: _recorded(chosen.run, resume, world), "the run's record")
    asked = settings.get("packing", recorded.packing)
    how_read, kind = replace(chosen.data, packing=asked), dtype_of(model)
    how_read = settled_packing(how_read, model.config, progress.message, kind)
    chosen = replace(chosen, data=how_read)
    prepared = _load_data(model, tokenizer, data, eval_data, chosen, recorded, progress)
    has_validation = prepared.validation is not None
    check_patience(chosen.run, resume=resume, has_validation=has_validation)
    train_config = chosen.train.with_steps(len(prepared.train), recorded=recorded.steps)
    chosen = replace(chosen, train=train_config)
    train_config = train_config.resolved(full=False)
    record = _describe(
        model, type(shown).__name__, prepared, data, eval_data, chosen, train_config, choice, world
    )
    check_alike(alike_before(record, choice), world)
    broadcast_trained(model, world, "the adapter before training")  # each drew another A
    torch.manual_seed(train_config.seed)  # of dropout
    fast, tell = chosen.run.fast, progress.message
    steps = choose_steps(model, choice, train_config, fast=fast, on_message=tell, world=world)
    check_alike(alike_in_training(record, steps), world)
    name = given or default_name(record.model or "model")
    create = partial(create_run, out, name, resume=resume, record=record)
    with shared_run(world, create, progress.message) as run:
        job = TrainingJob(
            **data_inputs(prepared, train_config, steps, choice, world),
            world=world,
            model=model,
            steps=steps,
            train_config=train_config,
            run_config=chosen.run,
            run=run,
            choice=choice,
            progress=progress,
            resume=resume,
            callbacks=called,
            shown_model=shown,
        )
        return _run(job, model, prepared, run, progress)


def _run(
    job: TrainingJob, model: nn.Module, data: PreparedData, run: Run, progress: Progress
) -> TrainedAdapter:
    def save(folder: Path) -> None:
        save_adapter(model, folder)
        data.tokenizer.save(folder)  # with the chat template of the training data
        save_prompt_format(data.prompts, folder)

    world = job.world
    world.on_main(lambda: save_start_in_run(run, save, progress), "the start")
    with ExitStack() as opened:
        if job.run_config.tensorboard and world.is_main:
            log = event_file(run.folder / "tensorboard", progress.message)
            run.on_metrics = opened.enter_context(log)
        result = run_loop(job)
    saved = world.on_main(lambda: save_in_run(run, "adapter", save, progress), "the final save")
    try:
        run.write_result(RunResult(**vars(result)))
    except CheckpointError as error:  # the disk is full, but the adapter is saved
        progress.message(str(error))
    return TrainedAdapter(run.folder, saved, result)


@dataclass(frozen=True)
class _Recorded:
    """What a resumed run's record says."""

    now: datetime | None
    """The date that the chat template sees."""
    prompts: PromptFormat | None
    steps: int | None
    packing: bool | None = None


def _recorded(run: RunConfig, resume: bool, world: World) -> _Recorded:
    if not resume:
        return _Recorded(None if world.is_alone else datetime.now(), None, None)
    folder = run.out / str(run.name)
    steps, packing = recorded_steps(folder), recorded_packing(folder)
    return _Recorded(read_start_time(folder), prompts_to_resume(folder), steps, packing)


def _take_settings(given: dict[str, Any]) -> _Settings:
    """Return the settings in their groups. Raises ConfigError for those that cannot be used."""
    settings = by_names_of_today(given, "train")
    refused = [name for name in settings if name in NOT_HERE]
    if refused:
        raise ConfigError(f"Cannot train with {refused[0]}=…: {NOT_HERE[refused[0]]}.")
    known = [name for kind in GROUPS for name in names_of(kind) if name not in NOT_HERE]
    wrong = describe_unknown(settings, known)
    if wrong:
        raise UnknownSettingError(f"Cannot train: {wrong}")
    parts = [
        kind(**{name: settings[name] for name in names_of(kind) if name in settings})
        for kind in GROUPS
    ]
    train_config, data, run = parts
    return _Settings(
        cast(TrainConfig, train_config),
        cast(DataConfig, data),
        replace(cast(RunConfig, run), samples=0),
    )


def _check_trains(model: nn.Module) -> None:
    applied_lora(model)  # raises without LoRA
    if not any(parameter.requires_grad for parameter in trained_parameters(model)):
        raise ConfigError(
            f"Cannot train this {type(model).__name__}: none of its parameters has requires_grad. "
            "Call apply_lora(model), or load_adapter(model, folder, trainable=True)."
        )


def _trains_modules(model: nn.Module) -> bool:
    """Whether more than A and B trains: embedding rows, or whole modules."""
    trained = (name for name, p in model.named_parameters() if p.requires_grad)
    return not all(name.endswith(("lora_A", "lora_B")) for name in trained)


def _load_data(
    model: LanguageModel,
    tokenizer: Any,
    data: Source,
    eval_data: Source | None,
    chosen: _Settings,
    recorded: _Recorded,
    progress: Progress,
) -> PreparedData:
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    prepared = prepare_data(
        data,
        as_text_tokenizer(tokenizer),
        chosen.data,
        chosen.train.seed,
        validation_source=eval_data,
        now=recorded.now,
        n_rows=embedding.num_embeddings,
        trained=recorded.prompts,
        on_message=progress.message,
    )
    check_positions(model, prepared.longest_sequence_tokens)
    report = inspect_prepared(prepared, data, chosen.data)
    excess = describe_excess(report.longest_tokens, model.config.max_position_embeddings)
    for note in [*report.notes, *report.warnings, *([excess] if excess else [])]:
        progress.message(f"note: {note}")
    return prepared


def as_text_tokenizer(tokenizer: Any) -> TextTokenizer:
    """Return a tokenizer of transformers, or the one in a directory, as one of ours.

    Raises ModelError for anything else, DataError for one that has no tokenizer.json.
    """
    if isinstance(tokenizer, TextTokenizer):
        return tokenizer
    if isinstance(tokenizer, str | Path):
        return load_tokenizer(Path(tokenizer))
    if not is_transformers(tokenizer):
        raise ModelError(
            f"Cannot use a {type(tokenizer).__name__} as tokenizer. Allowed: a tokenizer of "
            "transformers or of lora.load_model, or the directory of a tokenizer.json."
        )
    with tempfile.TemporaryDirectory(prefix="lora-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        return load_tokenizer(Path(folder))


def _describe(
    model: nn.Module,
    name: str,
    data: PreparedData,
    source: Source,
    eval_source: Source | None,
    chosen: _Settings,
    train_config: TrainConfig,
    choice: DeviceChoice,
    world: World,
) -> RunRecord:
    kind = quantisation_of(model)
    return RunRecord(
        kind="finetune",
        method="lora",
        model=name,
        base_dtype=None if kind is None else kind.dtype,
        nf4=None if kind is None or kind.dtype != "nf4" else weights_of(kind).nf4_settings,
        device=choice.reason,
        threads=torch.get_num_threads(),
        world_size=None if world.is_alone else world.size,
        parallel=None if world.is_alone else "ddp",
        learning_rate=train_config.peak_learning_rate,
        base_fingerprint=base_fingerprint(model),
        lora=asdict(applied_lora(model).config),
        train=asdict(chosen.train),
        data_config=asdict(chosen.data),
        run=asdict(chosen.run),
        data=replace(
            describe_data(data, source, eval_source), counts=asdict(data.train_encoded.counts)
        ),
    )
