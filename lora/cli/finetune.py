"""`lora finetune`: fine-tune a model on examples."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lora.cli.flags.from_fields import LORA, Flat, config_from, flags_from
from lora.cli.flags.shared import (
    BaseFlags,
    DataFlags,
    Deterministic,
    Devices,
    Implementation,
    Json,
    LoRAFlags,
    MemoryFlags,
    Model,
    Report,
    Resume,
    TrainFlags,
    TrainingData,
    ValidationData,
)
from lora.cli.results.program import program
from lora.config import DataConfig, LoRAConfig, MemoryConfig, RunConfig, TrainConfig
from lora.distributed.launch import Processes, processes_to_start
from lora.distributed.ranks import is_main_process
from lora.errors import ConfigError
from lora.runs.read_record import read_run_record
from lora.runs.typed_json import json_text
from lora.terminal import print_line, print_note

if TYPE_CHECKING:
    from lora.finetune.job import FinetuneResult

DIVERGED_EXIT_CODE = 1
"""The run came to its end, and the loss of what it saved is far above that of the start."""

Full = Annotated[
    bool, Parameter(group=LORA, help="Full fine-tuning: train all weights, without LoRA.")
]
FromAdapter = Annotated[
    Path | None,
    Parameter(
        group=LORA,
        help="Adapter to continue training from (also runs/x@500); its rank and targets are used.",
    ),
]


@flags_from(RunConfig)
class RunFlags:
    """Evaluation, checkpoints, run directory and device."""


def finetune(
    data: TrainingData,
    *,
    model: Model = None,
    implementation: Implementation = "auto",
    eval_data: ValidationData = None,
    full: Full = False,
    from_adapter: FromAdapter = None,
    resume: Resume = False,
    report: Report = True,
    devices: Devices = None,
    deterministic: Deterministic = False,
    json: Json = False,
    lora: Annotated[LoRAFlags | None, Flat] = None,
    train: Annotated[TrainFlags | None, Flat] = None,
    data_config: Annotated[DataFlags | None, Flat] = None,
    run: Annotated[RunFlags | None, Flat] = None,
    memory: Annotated[MemoryFlags | None, Flat] = None,
    base: Annotated[BaseFlags | None, Flat] = None,
) -> int | Processes:
    """Fine-tune a model with LoRA, or with --full all of its weights.

    For example:

        lora finetune orders.jsonl
        lora finetune --data chats.jsonl --model ./llama --rank 16 --steps 500
        lora finetune --name orders --resume
        lora finetune run.yaml --steps 500
        lora finetune --data chats.jsonl --max-length 8192 --memory full
        lora finetune --data chats.jsonl --devices 4

    Data formats: chats (messages, ShareGPT), prompt and completion,
    instruction and output, text and label, or plain text; for columns of other
    names --columns or --template. The adapter is saved in PEFT's format:
    the weights with the lowest validation loss, or with --save last the last ones.
    Flags have the names of PEFT, TRL, LLaMA-Factory and axolotl too, where they
    mean the same; lora init writes a settings file with all of them.
    The exit code is 1 if the loss of what was saved diverged.
    """
    run_config = config_from(RunConfig, run or RunFlags())
    _check_flags(resume, run_config.name, full, lora, from_adapter)
    lora_config = config_from(LoRAConfig, lora or LoRAFlags())
    train_config = config_from(TrainConfig, train or TrainFlags())
    how_read = config_from(DataConfig, data_config or DataFlags())
    memory_config = config_from(MemoryConfig, memory or MemoryFlags())

    from lora.data.inspection_view import print_report
    from lora.distributed.devices import check_batch
    from lora.distributed.world import World
    from lora.finetune.job import FinetuneJob
    from lora.finetune.run import check_before_processes
    from lora.finetune.run import finetune as run_job
    from lora.finetune.unused import check_unused
    from lora.report import report_on
    from lora.report.records.next_commands import next_commands
    from lora.runs.progress import RichProgress

    job = FinetuneJob(
        data=data,
        model=model,
        implementation=implementation,
        eval_data=eval_data,
        lora=None if full else lora_config,
        train=train_config,
        data_config=how_read,
        run=run_config,
        memory=memory_config,
        from_adapter=from_adapter,
        resume=resume,
        **vars(base or BaseFlags()),
        deterministic=deterministic,
    )
    check_unused(job)
    if processes := processes_to_start(devices, run_config.device):
        check_batch(train_config, World(size=processes.count))  # before they have all started
        check_before_processes(job)
        return processes
    progress = RichProgress("finetune")  # on standard error: the result alone goes to the other
    done = run_job(
        job,
        progress,
        show_data=lambda report: print_report(report, progress.console, is_compact=True),
    )
    page = report_on(done.folder, progress.message) if report and is_main_process() else None
    has_gguf = read_run_record(done.folder).has_gguf
    commands = next_commands(done.saved, model, program(), has_gguf=has_gguf)
    code = _report(done, page, commands, json)
    if done.folder not in done.saved.parents:
        print_note(
            f"lora: Cannot write {done.folder / done.saved.name}: see above. It is saved in "
            f"{done.saved} instead: copy it to a safe place."
        )
        return 2
    return code


def _check_flags(
    resume: bool,
    name: str | None,
    full: bool,
    lora: LoRAFlags | None,
    from_adapter: Path | None,
) -> None:
    recorded = f" What the run {name} recorded counts as given." if resume else ""
    if from_adapter is not None and lora is not None:
        raise ConfigError(
            "Cannot combine --from-adapter with LoRA flags such as --rank: an adapter is trained "
            f"on with its own rank, alpha, dropout and targets. Remove one or the other.{recorded}"
        )
    of_lora = lora or from_adapter
    if full and of_lora is not None:
        raise ConfigError(
            "Cannot combine --full with LoRA flags or --from-adapter: full fine-tuning trains all "
            f"weights, without an adapter. Remove one or the other.{recorded}"
        )


def _report(done: FinetuneResult, page: Path | None, commands: list[str], json: bool) -> int:
    result = done.result
    code = DIVERGED_EXIT_CODE if result.diverged else 0
    if json:
        found = {"folder": str(done.folder), "saved": str(done.saved), **asdict(result)}
        found["memory"] = done.memory.to_dict()
        found["report"] = None if page is None else str(page)
        found["next"] = commands
        print(json_text(found))
        return code
    from lora.training.outcome import describe_result, describe_saved

    for line in describe_result(result):
        print_line(line)
    print_line(done.memory.describe())
    print_line(f"saved: {done.saved} ({describe_saved(result)})")
    if page is not None:
        print_line(f"report: {page}")
    print_line("\n".join(["next:", *(f"  {command}" for command in commands)]))
    return code
