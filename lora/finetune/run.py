"""Fine-tune a pretrained model on examples: the whole job, from settings to a saved adapter.

Settings, data and device are checked before the weights are loaded; the run directory is created
last, so a refused job leaves nothing behind.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from lora.adapters.added_tokens import add_tokens_to_all, add_tokens_to_lora
from lora.adapters.apply import apply_lora
from lora.adapters.fingerprint import base_fingerprint
from lora.adapters.save_load import load_adapter, read_adapter_config, save_adapter
from lora.config import TrainConfig
from lora.data.inspection import inspect_prepared
from lora.data.inspection_report import DataReport
from lora.data.prepare import PreparedData, prepare_data
from lora.data.tokenizers.subword import TextTokenizer, load_tokenizer
from lora.decoder.decoder import Decoder
from lora.device import DeviceChoice, choose_device, deterministic_algorithms
from lora.errors import CheckpointError
from lora.fast.choose import choose_steps
from lora.fast.llama.checkpointing import ActivationCheckpointing
from lora.fast.memory.plan import MemoryPlan
from lora.finetune.job import FinetuneJob, FinetuneResult, check_base_dtype, describe_job
from lora.finetune.loop_inputs import find_tensorboard, training_job
from lora.finetune.memory import RunMemory, describe_plan, plan_run
from lora.pretrained.hf_weights import load_decoder, save_decoder
from lora.pretrained.sources import ModelSource, find_model
from lora.runs.directory import Run, check_run_directory, create_run, default_name, read_start_time
from lora.runs.disk import reading
from lora.runs.progress import NoProgress, Progress
from lora.runs.read_record import read_run_record
from lora.runs.record import RUN_FILE, RunResult
from lora.training.out_of_memory import LOADING_ADVICE, advise, explain_out_of_memory
from lora.training.step_runner import StepRunner
from lora.training.trainer import train


def finetune(
    job: FinetuneJob,
    progress: Progress | None = None,
    *,
    show_data: Callable[[DataReport], None] | None = None,
) -> FinetuneResult:
    """Run `job` to its end and save what was learned.

    `show_data` is called with the data report before the weights are loaded; without it, the
    report's notes and warnings go to `progress`.

    Raises ConfigError, DataError or ModelError before anything is written; TrainingError if the
    loss is no longer finite (the newest checkpoint is kept).
    """
    with deterministic_algorithms() if job.deterministic else nullcontext():
        return _finetune(job, progress or NoProgress(), show_data)


def _finetune(
    job: FinetuneJob, progress: Progress, show_data: Callable[[DataReport], None] | None
) -> FinetuneResult:
    check_base_dtype(job)
    check_run_directory(job.run.out, job.run.name, resume=job.resume)
    choice = choose_device(job.run.device, job.train.precision)
    open_board = find_tensorboard() if job.run.tensorboard else None
    source = find_model(job.model)
    data, report = check_data(job, source.folder, progress)
    if show_data is not None:
        show_data(report)
    else:
        for text in report.notes + report.warnings:
            progress.message(f"note: {text}")
    progress.message(f"{source.name} on {choice.reason}")
    memory_plan = _plan(job, source, data, choice)
    planned = describe_plan(memory_plan)
    progress.message(planned)
    if memory_plan.reason:
        progress.message(memory_plan.reason)
    with explain_out_of_memory(
        lambda: f"while the weights were loaded. {planned}. {LOADING_ADVICE}"
    ):
        model, fingerprint = _load_model(job, source, choice, data.tokenizer, progress)
    train_config = job.train.resolved(full=job.lora is None)
    name = job.run.name or default_name(source.name)
    stored = memory_plan.checkpointing
    record = replace(
        describe_job(job, source, data, report, choice),
        learning_rate=train_config.peak_learning_rate,
        base_fingerprint=fingerprint,
        activation_checkpointing=None if stored is None else stored.to_record(),
    )
    steps = _choose_steps(job, model, choice, train_config, memory_plan, progress)
    with create_run(job.run.out, name, resume=job.resume, record=record) as run:
        if run.note:
            progress.message(run.note)
        if open_board is not None:
            run.on_metrics = open_board(run.folder / "tensorboard")
        result = train(
            training_job(job, model, data, choice, train_config, run, progress, steps, memory_plan)
        )
        saved = _save(job, model, data.tokenizer, source, run, progress)
        memory = RunMemory(memory_plan, result.peak_memory_bytes)
        try:
            run.write_result(RunResult(**vars(result), memory=memory.to_record()))
        except CheckpointError as error:  # the disk is full, and what was learned is saved
            progress.message(str(error))
        return FinetuneResult(run.folder, saved, result, memory)


def _choose_steps(
    job: FinetuneJob,
    model: Decoder,
    choice: DeviceChoice,
    train: TrainConfig,
    plan: MemoryPlan,
    progress: Progress,
) -> StepRunner:
    if job.deterministic:
        progress.message("deterministic: torch's deterministic algorithms, and the plain step")
    planned = f"{describe_plan(plan)}. {_advice(job, plan)}"
    with explain_out_of_memory(lambda: f"while the step was prepared. {planned}"):
        return choose_steps(
            model,
            choice,
            train,
            fast=job.run.fast and not job.deterministic,
            checkpointing=plan.checkpointing,
            on_message=progress.message,
        )


def check_data(
    job: FinetuneJob, model_folder: Path, progress: Progress
) -> tuple[PreparedData, DataReport]:
    """Return `job`'s examples as token sequences, and the data report; no weights are loaded.

    A resumed run gives chat templates the date on which it started, so that its sequences are the
    same. Raises DataError if no token would get a loss.
    """
    data = prepare_data(
        job.data,
        load_tokenizer(_tokenizer_folder(job, model_folder)),
        job.data_config,
        job.train.seed,
        validation_source=job.eval_data,
        now=read_start_time(job.run.out / str(job.run.name)) if job.resume else None,
        on_message=progress.message,
    )
    progress.message(
        f"{len(data.train_examples)} training examples ({data.train.n_target_tokens:,} target "
        f"tokens in {len(data.train)} sequences), {len(data.validation_examples)} for validation"
    )
    return data, inspect_prepared(data, job.data, job.data_config)


def _plan(
    job: FinetuneJob, source: ModelSource, data: PreparedData, choice: DeviceChoice
) -> MemoryPlan:
    lora = job.lora if job.from_adapter is None else read_adapter_config(job.from_adapter)
    fast = job.run.fast and not job.deterministic
    checkpointing = _former_checkpointing(job)
    return plan_run(
        source.folder,
        lora,
        job.train,
        data,
        choice,
        fast=fast,
        memory=job.memory,
        checkpointing=checkpointing,
        fp8=job.base_dtype == "fp8",
    )


def _advice(job: FinetuneJob, plan: MemoryPlan) -> str:
    has_lora = job.lora is not None or job.from_adapter is not None
    return advise(plan, job.train, has_lora=has_lora)


def _former_checkpointing(job: FinetuneJob) -> ActivationCheckpointing | None:
    """Return a resumed run's activation checkpointing: another mode would round differently."""
    directory = job.run.out / str(job.run.name)
    if not job.resume or not (directory / RUN_FILE).is_file():
        return None  # `create_run` reports what is there, and what is not
    stored = read_run_record(directory).activation_checkpointing
    with reading(directory / RUN_FILE):
        return None if stored is None else ActivationCheckpointing.from_record(stored)


def _tokenizer_folder(job: FinetuneJob, model_folder: Path) -> Path:
    """Return the tokenizer's directory: the adapter's, if it was saved with one."""
    own = job.from_adapter
    return own if own is not None and (own / "tokenizer.json").is_file() else model_folder


def _load_model(
    job: FinetuneJob,
    source: ModelSource,
    choice: DeviceChoice,
    tokenizer: TextTokenizer,
    progress: Progress,
) -> tuple[Decoder, str]:
    """Return the model ready to train, and the fingerprint of its base."""
    # Frozen weights are read in the compute dtype; fully trained ones stay fp32.
    is_frozen = job.lora is not None or job.from_adapter is not None
    dtype = choice.compute_dtype if is_frozen else torch.float32
    fp8 = job.base_dtype == "fp8"
    model = load_decoder(source.folder, dtype=dtype, device=choice.device, fp8=fp8)
    fingerprint = base_fingerprint(model)
    if job.from_adapter is not None:
        load_adapter(model, job.from_adapter, trainable=True)
    elif job.lora is not None:
        seed = job.train.seed if job.lora.init_seed is None else job.lora.init_seed
        apply_lora(model, replace(job.lora, init_seed=seed))
    add_tokens = add_tokens_to_lora if is_frozen else add_tokens_to_all
    note = add_tokens(model, tokenizer, job.data_config.special_tokens)
    if note is not None:
        progress.message(note)
    if not is_frozen:
        model.requires_grad_(True)
    torch.manual_seed(job.train.seed)
    return model, fingerprint


def _save(
    job: FinetuneJob,
    model: Decoder,
    tokenizer: TextTokenizer,
    source: ModelSource,
    run: Run,
    progress: Progress,
) -> Path:
    """Return where what was learned is: in the run's folder, or in a new one if that is full."""
    is_full = job.lora is None and job.from_adapter is None
    kind = "model" if is_full else "adapter"

    def save(folder: Path) -> Path:
        if is_full:
            save_decoder(model, folder)
        else:
            save_adapter(model, folder, base_name=source.name)
        tokenizer.save(folder)  # with the chat template that was learned
        return folder

    try:
        return save(run.folder / kind)
    except CheckpointError as error:  # hours of training are not to be lost to a full disk
        elsewhere = save(Path(tempfile.mkdtemp(prefix=f"lora-{run.folder.name}-")) / kind)
        progress.message(f"{error} What was learned is in {elsewhere}: copy it to a safe place.")
        return elsewhere
