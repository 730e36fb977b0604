"""Fine-tune a pretrained model: the whole job, from files to a saved adapter.

What can be wrong with configuration, data and device is found before the weights are loaded, and
the run directory is created last.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial

from lora.adapters.save_load import read_adapter_config
from lora.config import BaseWeights, ImplementationName, TrainConfig
from lora.data.inspection_report import DataReport
from lora.data.prepare import PreparedData
from lora.decoder.language_model import LanguageModel
from lora.device import (
    DeviceChoice,
    choose_device,
    deterministic_algorithms,
    free_bytes,
    visible_gpus,
)
from lora.distributed.devices import check_batch, own_device
from lora.distributed.one_run import check_alike, resumes, shared_run
from lora.distributed.shards import Rows, gathered_tables
from lora.distributed.start import joined
from lora.distributed.world import World
from lora.errors import AdapterError, CheckpointError, TargetError
from lora.fast.choose import PlannedStep, Recompute, choose_steps
from lora.fast.memory.parallel import check_parallel
from lora.fast.runner import FastStepRunner
from lora.finetune.event_files import check_tensorboard, event_file
from lora.finetune.job import (
    FinetuneJob,
    FinetuneResult,
    check_base_dtype,
    check_from_adapter,
    describe_job,
)
from lora.finetune.load_data import load_data
from lora.finetune.loop_inputs import alike_before, alike_in_training, training_job
from lora.finetune.memory import (
    ChosenMemory,
    RunMemory,
    describe_plan,
    plan_run,
    recorded_checkpointing,
    recorded_failures,
)
from lora.finetune.model import load_model, save_model, save_start
from lora.finetune.outline import outline
from lora.finetune.sharded_model import build_sharded_model
from lora.finetune.unused import check_patience
from lora.inference.base_weights import base_of_training
from lora.inference.checkpoints.find import find_adapter, split_name
from lora.inference.loading import describe_other_base, find_model_of
from lora.inference.run_settings import find_implementation, implementation_to_resume
from lora.pretrained.load.models import model_config
from lora.pretrained.load.task import (
    check_base,
    check_native_only,
    planned_base,
    settled_base,
    settled_task,
)
from lora.pretrained.sources import ModelSource
from lora.runs.directory import check_run_directory, create_run, default_name
from lora.runs.progress import NoProgress, Progress
from lora.runs.read_record import read_run_record, recorded_steps
from lora.runs.record import RunRecord, RunResult
from lora.training.callbacks import Callback, Callbacks, as_callbacks
from lora.training.job import TrainingJob
from lora.training.out_of_memory import (
    LOADING_ADVICE,
    SHARDED_ADVICE,
    advise,
    explain_out_of_memory,
)
from lora.training.step_runner import StepRunner
from lora.training.trainer import train


def finetune(
    job: FinetuneJob,
    progress: Progress | None = None,
    *,
    show_data: Callable[[DataReport], None] | None = None,
    callbacks: Callbacks = (),
) -> FinetuneResult:
    """Run `job` to its end and save the adapter, or the whole model after full fine-tuning.

    `show_data` is called with the report on the data before the weights are loaded; without it,
    the report's notes and warnings are messages to `progress`. `callbacks` are called after steps,
    evaluations and saves.

    Raises ConfigError, DataError or ModelError before anything is written; TrainingError if the
    loss is no longer finite (the newest checkpoint is kept); Interrupted after a signal.

    Processes that torchrun has started train together, each on its own GPU; rank 0 writes, and has
    the progress and the callbacks.
    """
    called = as_callbacks(callbacks)
    with deterministic_algorithms() if job.deterministic else nullcontext():
        choice = choose_device(own_device(job.run.device), job.train.precision)
        with joined(choice.device) as world:
            if world.is_main:
                done = _finetune(job, choice, world, progress or NoProgress(), show_data, called)
            else:
                done = _finetune(job, choice, world, NoProgress(), None, ())
    # Cycles of references (the plan and the loop; frames of torch's imports) hold the weights: a
    # caller that loads the model next would have them twice.
    gc.collect()
    return done


@dataclass(frozen=True)
class _Inputs:
    """All of a job that is known before its weights are loaded."""

    data: PreparedData
    memory: ChosenMemory
    record: RunRecord
    """Without what only the loaded model tells."""


def _finetune(
    job: FinetuneJob,
    choice: DeviceChoice,
    world: World,
    progress: Progress,
    show_data: Callable[[DataReport], None] | None,
    callbacks: Sequence[Callback],
) -> FinetuneResult:
    job = replace(job, resume=resumes(job.run, job.resume, world, progress.message))
    job = _check(job, world)
    source = find_model_of(job.model, job.from_adapter)
    job = _settled(job, source, choice, world, progress)
    inputs = _find_inputs(job, source, choice, world, progress, show_data)
    has_validation = inputs.data.validation is not None
    check_patience(job.run, resume=job.resume, has_validation=has_validation)
    job = _with_steps(job, inputs.data, world)
    data, memory = inputs.data, inputs.memory
    planned = describe_plan(memory.plan)
    loaded: tuple[LanguageModel, str, Rows | None]
    with explain_out_of_memory(
        lambda: f"while the weights were loaded. {planned}. {_loading_advice(memory, choice)}"
    ):
        if memory.parallel == "fsdp":
            built = build_sharded_model(job, source, choice, data.tokenizer, progress)
            loaded = built.model, built.fingerprint, built.rows
        else:
            loaded = *load_model(job, source, choice, data.tokenizer, progress), None
        model, fingerprint, rows = loaded
    train_config = job.train.resolved(full=job.is_full)
    steps = _choose_steps(job, model, choice, train_config, memory, progress, world, rows)
    record = _complete_record(job, inputs, train_config, fingerprint)
    check_alike(alike_in_training(record, steps), world)
    name = job.run.name or default_name(source.name)
    with ExitStack() as opened:
        create = partial(create_run, job.run.out, name, resume=job.resume, record=record)
        run = opened.enter_context(shared_run(world, create, progress.message))
        if job.run.tensorboard and world.is_main:
            log = event_file(run.folder / "tensorboard", progress.message)
            run.on_metrics = opened.enter_context(log)
        with gathered_tables(model):
            world.on_main(lambda: save_start(job, model, data, source, run, progress), "the start")
        plan = memory.plan
        loop = training_job(
            job, model, data, choice, train_config, run, progress, steps, plan, callbacks, world
        )
        if world.is_main:
            memory.on_change = partial(_record_change, memory, loop)
        result = train(loop)
        saved = save_model(job, model, data, source, run, progress, world)
        measured = RunMemory(memory.plan, result.peak_memory_bytes)
        try:
            run.write_result(RunResult(**vars(result), memory=measured.to_record()))
        except CheckpointError as error:  # the disk is full, but the adapter is saved
            progress.message(str(error))
        return FinetuneResult(run.folder, saved, result, measured)


def _check(job: FinetuneJob, world: World) -> FinetuneJob:
    """Return the job with the path of its adapter. Raises for what can be wrong before all else."""
    check_base_dtype(job)
    check_from_adapter(job)
    check_parallel(job.run.parallel, world.size)
    check_batch(job.train, world)
    name = job.from_adapter
    if name is not None:  # a checkpoint is made an adapter, once
        path = world.on_main(lambda: find_adapter(name), "the adapter to continue")
        job = replace(job, from_adapter=path)
    run = job.run
    world.on_main(
        lambda: check_run_directory(run.out, run.name, resume=job.resume), "the run directory"
    )
    if run.tensorboard:
        check_tensorboard()
    return job


def _loading_advice(memory: ChosenMemory, choice: DeviceChoice) -> str:
    can_shard = choice.device.type == "cuda" and memory.parallel != "fsdp"
    advice, saving = SHARDED_ADVICE if can_shard else LOADING_ADVICE, memory.plan.nf4_saving
    if not saving:
        return advice
    packed_gb = (memory.plan.weights - saving) / 1e9
    return f"{advice} In 4 bits they take about {packed_gb:.1f} GB: --base-dtype nf4."


def _with_steps(job: FinetuneJob, data: PreparedData, world: World) -> FinetuneJob:
    """Return the job with its number of steps; a resumed run has what its record says."""

    def read() -> int | None:
        return recorded_steps(job.directory) if job.resume else None

    recorded = world.on_main(read, "the steps of the run")
    return replace(job, train=job.train.with_steps(len(data.train), recorded=recorded))


def _settled(
    job: FinetuneJob, source: ModelSource, choice: DeviceChoice, world: World, progress: Progress
) -> FinetuneJob:
    """Return the job with the code that runs its model; a resumed run keeps what it began with.

    An architecture that nothing runs is refused here, before the data are read.
    """
    recorded = world.on_main(
        lambda: _recorded_implementation(job, source), "the recorded implementation"
    )
    settled = settled_task(job, source.folder, recorded, progress.message, choice.compute_dtype)
    base = _settled_base(settled, source, progress.message)
    settled = replace(settled, **vars(base))
    _check_native_only(settled, source, settled.implementation)
    return settled


def _settled_base(
    job: FinetuneJob, source: ModelSource, on_message: Callable[[str], None]
) -> BaseWeights:
    """Return how the base is stored: as asked, as in its files, or as the adapter's was.

    A message has which of the last two it is.
    """
    base = settled_base(source.folder, job.base_weights, on_message, is_full=job.is_full)
    if job.from_adapter is None or job.base_dtype != "auto" or base.is_quantised:
        return base
    base = base_of_training(job.from_adapter)
    if base.is_quantised:
        on_message(
            f"base: in {base.base_dtype}, as {job.from_adapter} was trained; unquantised with "
            "--base-dtype original"
        )
    return base


def check_before_processes(job: FinetuneJob) -> None:
    """Raise before processes are started for what the job's base cannot be; no weights are read.

    The adapter of a checkpoint, which may have to be written first, is left to them.
    """
    check_base_dtype(job)
    if job.from_adapter is not None:
        if split_name(job.from_adapter)[1] is not None:
            return
        job = replace(job, from_adapter=find_adapter(job.from_adapter))
    source = find_model_of(job.model, job.from_adapter)
    recorded = _recorded_implementation(job, source)
    asked = recorded if job.implementation == "auto" else job.implementation
    fsdp = job.run.parallel == "fsdp"
    base = _settled_base(job, source, lambda message: None)
    check_base(source.folder, asked, base, is_full=job.is_full, fsdp=fsdp)


def _recorded_implementation(job: FinetuneJob, source: ModelSource) -> ImplementationName:
    former = implementation_to_resume(job.directory) if job.resume else None
    return former or find_implementation("auto", job.from_adapter, source.folder)


def _check_native_only(
    job: FinetuneJob, source: ModelSource, implementation: ImplementationName
) -> None:
    check_native_only(
        model_config(source.folder, implementation),
        base=job.base_weights,
        fsdp=job.run.parallel == "fsdp",
    )


def _find_inputs(
    job: FinetuneJob,
    source: ModelSource,
    choice: DeviceChoice,
    world: World,
    progress: Progress,
    show_data: Callable[[DataReport], None] | None,
) -> _Inputs:
    """Load the data and plan the memory."""
    data, report = load_data(job, source.folder, progress, world)
    if show_data is not None:
        show_data(report)
    else:
        for note in report.notes + report.warnings:
            progress.message(f"note: {note}")
    progress.message(f"{source.description} on {choice.reason}")
    record = describe_job(job, source, data, report, choice, world)
    check_alike(alike_before(record, choice), world)  # else the processes plan differently
    memory = _plan_memory(job, source, choice, world, data)
    memory.on_message = progress.message
    memory.ran_out = world.on_main(
        lambda: recorded_failures(job.directory) if job.resume else (), "the recorded memory"
    )
    planned = _with_steps(job, data, world)
    progress.message(outline(planned, job.train, data, memory.plan, world.share))
    if memory.parallel_reason:
        progress.message(memory.parallel_reason)
    if memory.plan.reason:
        progress.message(memory.plan.reason)
    return _Inputs(data, memory, record)


def _plan_memory(
    job: FinetuneJob, source: ModelSource, choice: DeviceChoice, world: World, data: PreparedData
) -> ChosenMemory:
    plan = partial(
        plan_run,
        model_config(source.folder, job.implementation),
        job.lora if job.from_adapter is None else read_adapter_config(job.from_adapter),
        job.train,
        data,
        choice,
        fast=job.allows_fast_step,
        memory=job.memory,
        checkpointing=world.on_main(
            lambda: recorded_checkpointing(job.directory, world.size) if job.resume else None,
            "the recorded memory",
        ),
        base=job.base_weights,
        quantised_weights=planned_base(source.folder, job.base_weights)[1],
        embedding_rows=len(job.data_config.special_tokens),
        world=world,
        parallel=job.run.parallel,
    )
    try:
        return plan()
    except TargetError as error:
        if job.from_adapter is None:
            raise
        other = describe_other_base(job.model, find_adapter(job.from_adapter), source)
        raise AdapterError(
            f"Cannot train the adapter {job.from_adapter} further on this model: it adapts layers "
            f"that are not here. {error}{other}"
        ) from None


def _complete_record(
    job: FinetuneJob, inputs: _Inputs, train_config: TrainConfig, fingerprint: str
) -> RunRecord:
    """Return the run's record, with what only the loaded model and the plan tell."""
    stored = inputs.memory.plan.checkpointing
    return replace(
        inputs.record,
        train=asdict(job.train),  # with the number of steps
        learning_rate=train_config.peak_learning_rate,
        parallel=inputs.memory.parallel,
        base_fingerprint=fingerprint,
        activation_checkpointing=None if stored is None else stored.to_record(),
        ran_out_of_memory=inputs.memory.ran_out or None,
    )


def _record_change(memory: ChosenMemory, loop: TrainingJob) -> None:
    """Changes `loop` and its run.json: a leaner mode was taken, and a resumed run must take it."""
    loop.memory_plan, stored = memory.plan, memory.plan.checkpointing
    record = replace(
        read_run_record(loop.run.folder),
        activation_checkpointing=None if stored is None else stored.to_record(),
        ran_out_of_memory=memory.ran_out,
    )
    loop.run.write_run_record(record)


def _choose_steps(
    job: FinetuneJob,
    model: LanguageModel,
    choice: DeviceChoice,
    train_config: TrainConfig,
    memory: ChosenMemory,
    progress: Progress,
    world: World,
    rows: Rows | None,
) -> StepRunner:
    if job.deterministic:
        progress.message("deterministic: torch's deterministic algorithms, and the plain step")
    plan = memory.plan
    planned = PlannedStep(
        checkpointing=plan.checkpointing,
        leaner=memory.take_leaner,
        by_machine=memory.planner.inputs.machine_devices is not None,
        recompute=Recompute(plan.recomputed_blocks, may_be_more=memory.may_change),
    )
    n_gpus = visible_gpus(choice.device)
    advice = advise(plan, job.train, has_lora=not job.is_full, n_gpus=n_gpus)
    with explain_out_of_memory(
        lambda: f"while the step was prepared. {describe_plan(plan)}. {advice}"
    ):
        steps = choose_steps(
            model,
            choice,
            train_config,
            fast=job.allows_fast_step,
            planned=planned,
            on_message=progress.message,
            world=world,
            rows=rows,
        )
    if isinstance(steps, FastStepRunner):
        stored = memory.refit(free_bytes(choice.device))
        steps.step.checkpointing = stored or steps.step.checkpointing
    return steps
