"""Fine-tune a real model on a file of examples: the whole job, from names to an adapter.

The order is the user's friend: what can be wrong with the settings, the data and the device is
found before the weights are loaded, and the run's folder is made last.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch

from lora.adapter_io import load_adapter, read_adapter_config, save_adapter
from lora.added_tokens import add_tokens_to_all, add_tokens_to_lora
from lora.apply import apply_lora
from lora.config import (
    FULL_LEARNING_RATE,
    LORA_LEARNING_RATE,
    BaseDtype,
    DataConfig,
    LoRAConfig,
    MemoryConfig,
    RunConfig,
    TrainConfig,
)
from lora.data.batches import BatchStream, ordered_batches
from lora.data.inspection import DataReport, inspect_prepared
from lora.data.prepare import PreparedData, prepare_data
from lora.data.readers import Source
from lora.data.tokenizers import TextTokenizer, load_tokenizer
from lora.decoder.decoder import Decoder
from lora.decoder.hf_weights import load_decoder, save_decoder
from lora.decoder.sources import ModelSource, find_model
from lora.device import DeviceChoice, choose_device, deterministic_algorithms
from lora.errors import CheckpointError, ConfigError, DependencyError, did_you_mean
from lora.fast.blocks import Keep
from lora.fast.choose import choose_steps
from lora.fingerprint import base_fingerprint
from lora.losses import loss_for
from lora.out_of_memory import LOADING_ADVICE, advise, explained
from lora.plan import MemoryPlan
from lora.progress import NoProgress, Progress
from lora.report import report_on
from lora.run_memory import RunMemory, describe_plan, plan_run
from lora.runs import (
    Run,
    check_place,
    create_run,
    default_name,
    read_first_day,
    read_json,
    reading,
)
from lora.samples import Sampler, choose_prompts
from lora.steps import Steps
from lora.trainer import TrainingJob, TrainResult, train

MOST_NAMED = 8
"""Examples that a message on a step that is not finite names."""


@dataclass(frozen=True)
class FinetuneJob:
    """What to fine-tune, on what, and how."""

    data: Source
    """A file or folder of examples, or a list of dicts."""
    model: str | None = None
    """A folder, a .gguf file, a hub's owner/name; None: SmolLM2-135M-Instruct."""
    eval_data: Source | None = None
    """Examples to measure on; None splits some off `data`."""
    lora: LoRAConfig | None = field(default_factory=LoRAConfig)
    """None trains all weights: full fine-tuning."""
    train: TrainConfig = field(default_factory=TrainConfig)
    data_config: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    from_adapter: Path | None = None
    """Go on from this adapter instead of a fresh one; its settings replace `lora`."""
    resume: bool = False
    """Go on with the run of this name from its newest checkpoint."""
    base_dtype: BaseDtype = "auto"
    """How the frozen linears are kept: auto in the products' type; fp8 in eight bits, with a scale
    for each output."""
    report: bool = False
    """Write `report.html`, `report.json` and pictures into the run's folder at the end."""
    deterministic: bool = False
    """Repeat to the bit on a GPU too: torch's deterministic algorithms, and the plain step."""


@dataclass(frozen=True)
class FinetuneResult:
    """Where the results are, and how the run ended."""

    folder: Path
    """The run's folder."""
    saved: Path
    """The adapter's folder in it, or the whole model's after full fine-tuning."""
    result: TrainResult
    memory: RunMemory
    """What was planned against what was measured."""
    report: Path | None = None
    """The page, if one was asked for and could be written."""


def finetune(
    job: FinetuneJob,
    progress: Progress | None = None,
    *,
    show_data: Callable[[DataReport], None] | None = None,
) -> FinetuneResult:
    """Run `job` to its end and save what was learned.

    `show_data` gets the report on the data before the weights are loaded; left out, `progress`
    hears what in it is likely not meant.

    Raises ConfigError, DataError or ModelError for what cannot work, before anything is written;
    TrainingError if the loss is no longer finite (the newest checkpoint is kept).
    """
    with deterministic_algorithms() if job.deterministic else nullcontext():
        return _finetune(job, progress or NoProgress(), show_data)


def _finetune(
    job: FinetuneJob, progress: Progress, show_data: Callable[[DataReport], None] | None
) -> FinetuneResult:
    _check_base_dtype(job)
    check_place(job.run.out, job.run.name, resume=job.resume)
    choice = choose_device(job.run.device, job.train.precision)
    open_board = _find_tensorboard() if job.run.tensorboard else None
    source = find_model(job.model)
    data, report = check_data(job, source.folder, progress)
    if show_data is not None:
        show_data(report)
    else:
        for told in report.notes + report.warnings:
            progress.say(f"note: {told}")
    progress.say(f"{source.name} on {choice.reason}")
    memory_plan = _plan(job, source, data, choice)
    planned = describe_plan(memory_plan)
    progress.say(planned)
    if memory_plan.reason:
        progress.say(memory_plan.reason)
    with explained(lambda: f"while the weights were loaded. {planned}. {LOADING_ADVICE}"):
        model, fingerprint = _load_model(job, source, choice, data.tokenizer, progress)
    rate = job.train.learning_rate
    if rate is None:
        rate = FULL_LEARNING_RATE if job.lora is None else LORA_LEARNING_RATE
    name = job.run.name or default_name(source.name)
    described = {**_describe(job, source, data, choice), "learning_rate": rate}
    described["from_adapter"] = job.from_adapter
    if job.base_dtype != "auto":
        described["base_dtype"] = job.base_dtype
    described["data"]["warnings"] = report.warnings
    described["base_fingerprint"] = fingerprint
    if memory_plan.keep is not None:
        described["kept_of_blocks"] = asdict(memory_plan.keep)
    if job.deterministic:
        described["deterministic"] = True
        progress.say("deterministic: torch's algorithms that repeat to the bit, and the plain step")
    with explained(lambda: f"while the step was prepared. {planned}. {_advice(job, memory_plan)}"):
        fast = job.run.fast and not job.deterministic
        keep = memory_plan.keep
        steps = choose_steps(model, choice, job.train, fast=fast, keep=keep, say=progress.say)
    with create_run(job.run.out, name, resume=job.resume, described=described) as run:
        if run.note:
            progress.say(run.note)
        if open_board is not None:
            run.on_metrics = open_board(run.folder / "tensorboard")
        whole = _training_job(job, model, data, choice, rate, run, progress, steps)
        whole.memory_plan = memory_plan
        result = train(whole)
        saved = _save(job, model, data.tokenizer, source, run, progress)
        memory = RunMemory(memory_plan, result.peak_memory_bytes)
        report_page = None
        try:
            run.write_json("result.json", {**asdict(result), "memory": memory.to_dict()})
            report_page = report_on(run.folder, progress.say) if job.report else None
        except CheckpointError as error:  # the disk is full, and what was learned is saved
            progress.say(str(error))
        return FinetuneResult(run.folder, saved, result, memory, report_page)


def _check_base_dtype(job: FinetuneJob) -> None:
    allowed = get_args(BaseDtype)
    if job.base_dtype not in allowed:
        near = did_you_mean(str(job.base_dtype), allowed)
        raise ConfigError(
            f"base_dtype={job.base_dtype!r}: allowed are {', '.join(allowed)}.{near} Change it."
        )
    if job.base_dtype == "fp8" and job.lora is None and job.from_adapter is None:
        raise ConfigError(
            "base_dtype='fp8' was asked for with full fine-tuning: weights of eight bits cannot "
            "train, their steps would be rounded away. Train through LoRA, or leave it out."
        )


def check_data(
    job: FinetuneJob, model_folder: Path, progress: Progress
) -> tuple[PreparedData, DataReport]:
    """Return `job`'s examples as rows of tokens, and what they are; no weights are loaded.

    A resumed run tells chat templates the date on which it began, so that its rows are the same.
    Raises DataError if nothing can be learned from them.
    """
    data = prepare_data(
        job.data,
        load_tokenizer(_tokenizer_folder(job, model_folder)),
        job.data_config,
        job.train.seed,
        held_out_source=job.eval_data,
        now=read_first_day(job.run.out / str(job.run.name)) if job.resume else None,
        say=progress.say,
    )
    progress.say(
        f"{len(data.train_examples)} examples to learn ({data.train.n_target_tokens:,} learned "
        f"tokens in {len(data.train)} rows), {len(data.held_out_examples)} to measure"
    )
    return data, inspect_prepared(data, job.data, job.data_config)


def _plan(
    job: FinetuneJob, source: ModelSource, data: PreparedData, choice: DeviceChoice
) -> MemoryPlan:
    lora = job.lora if job.from_adapter is None else read_adapter_config(job.from_adapter)
    fast = job.run.fast and not job.deterministic
    keep = _kept_before(job)
    return plan_run(
        source.folder,
        lora,
        job.train,
        data,
        choice,
        fast=fast,
        memory=job.memory,
        keep=keep,
        fp8=job.base_dtype == "fp8",
    )


def _advice(job: FinetuneJob, plan: MemoryPlan) -> str:
    has_lora = job.lora is not None or job.from_adapter is not None
    sizes = {"batch_size": job.train.batch_size, "micro_batches": job.train.micro_batches}
    return advise(plan, **sizes, has_lora=has_lora)


def _find_tensorboard() -> Callable[[Path], Callable[[dict[str, Any]], None]]:
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


def _kept_before(job: FinetuneJob) -> Keep | None:
    """Return what a resumed run kept of its blocks: kept otherwise, they would round otherwise."""
    path = job.run.out / str(job.run.name) / "run.json"
    if not job.resume or not path.is_file():  # `create_run` says what is there, and what is not
        return None
    with reading(path):
        kept = read_json(path).get("kept_of_blocks")
        return None if kept is None else Keep(**kept)


def _tokenizer_folder(job: FinetuneJob, model_folder: Path) -> Path:
    """Return where the tokenizer is: an adapter has its own if it has tokens of its own."""
    own = job.from_adapter
    return own if own is not None and (own / "tokenizer.json").is_file() else model_folder


def _load_model(
    job: FinetuneJob,
    source: ModelSource,
    choice: DeviceChoice,
    tokenizer: TextTokenizer,
    progress: Progress,
) -> tuple[Decoder, str]:
    """Return the model as it will train, and the fingerprint of its base."""
    # What stays frozen is read in the products' type; what trains whole keeps fp32.
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
    told = add_tokens(model, tokenizer, job.data_config.special_tokens)
    if told is not None:
        progress.say(told)
    if not is_frozen:
        model.requires_grad_(True)
    torch.manual_seed(job.train.seed)
    return model, fingerprint


def _training_job(
    job: FinetuneJob,
    model: Decoder,
    data: PreparedData,
    choice: DeviceChoice,
    rate: float,
    run: Run,
    progress: Progress,
    steps: Steps | None,
) -> TrainingJob:
    rows = job.train.batch_size // job.train.micro_batches
    held_out = data.held_out
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
    rows = train.batch_size // train.micro_batches

    def name(step: int, places: Sequence[tuple[int, int]]) -> str:
        chosen = [micro * rows + row for micro, row in places] or range(train.batch_size)
        numbers = stream.numbers((step - 1) * train.batch_size + place for place in chosen)
        sources = [data.train_examples[owner].source for owner in data.train.owners(numbers)]
        more = f" and {len(sources) - MOST_NAMED} more" if len(sources) > MOST_NAMED else ""
        return f"Read there: {', '.join(sources[:MOST_NAMED])}{more}."

    return name


def _sampler(
    job: FinetuneJob, model: Decoder, data: PreparedData, run: Run, progress: Progress
) -> Sampler:
    room_tokens = model.config.max_position_embeddings - job.run.sample_tokens
    prompts = choose_prompts(
        data.held_out_examples,
        data.tokenizer,
        job.run.samples,
        most_tokens=min(job.data_config.max_length, room_tokens),
        now=data.now,
    )
    return Sampler(model, prompts, data.tokenizer, run, progress, job.run.sample_tokens)


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
        progress.say(f"{error} What was learned is in {elsewhere}: copy it to a safe place.")
        return elsewhere


def _describe(
    job: FinetuneJob, source: ModelSource, data: PreparedData, choice: DeviceChoice
) -> dict[str, Any]:
    return {
        "model": source.name,
        "model_source": job.model,
        "device": choice.reason,
        "threads": torch.get_num_threads(),
        "data": {
            "source": _named(job.data),
            "eval_source": _named(job.eval_data),
            "examples": len(data.train_examples),
            "held_out_examples": len(data.held_out_examples),
            "rows": len(data.train),
            "learned_tokens": data.train.n_target_tokens,
            "counts": asdict(data.train_encoded.counts),
            "chat_template": data.template_origin,
            "now": data.now.isoformat(),
            "fingerprint": data.train.fingerprint(),
            "held_out_fingerprint": data.held_out.fingerprint() if data.held_out else None,
        },
        "lora": None if job.lora is None else asdict(job.lora),
        "train": asdict(job.train),
        "data_config": asdict(job.data_config),
        "run": asdict(job.run),
    }


def _named(source: Source | None) -> str | None:
    if source is None:
        return None
    return str(source) if isinstance(source, Path | str) else "rows given in Python"
