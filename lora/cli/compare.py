"""`lora compare`: LoRA and full fine-tuning on the same batches, measured in the same way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lora.cli.flags.from_fields import COMPARED, Flat, config_from, flags_from
from lora.cli.flags.shared import (
    BaseFlags,
    DataFlags,
    Devices,
    Implementation,
    Json,
    LoRAFlags,
    Model,
    Report,
    Resume,
    TrainFlags,
    TrainingData,
    ValidationData,
)
from lora.compare.config import CompareConfig, LearningRates
from lora.compare.decoder_job import EvaluationConfig
from lora.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.distributed.launch import Processes, processes_to_start
from lora.distributed.ranks import is_main_process
from lora.runs.comparison_record import COMPARE_FILE, Same
from lora.runs.disk import read_json
from lora.runs.record import Method
from lora.runs.typed_json import json_text
from lora.terminal import build_console, print_line

if TYPE_CHECKING:
    from lora.compare.run import CompareResult

SameAmount = Annotated[
    Same,
    Parameter(
        group=COMPARED,
        help="What all methods get: the same number of steps, or the same training time (LoRA's).",
    ),
]
Peft = Annotated[
    bool, Parameter(group=COMPARED, help="Also train LoRA with PEFT, on the transformers model.")
]


@flags_from(LearningRates)
class RateFlags:
    """Learning rates to try."""


@flags_from(EvaluationConfig)
class EvaluationFlags:
    """What is evaluated besides speed, memory and validation loss; on the command line by path."""

    forgetting_data: Path | None = None
    test_data: Path | None = None


@flags_from(
    RunConfig,
    without=("keep_checkpoints", "patience", "skip_nonfinite", "tensorboard", "parallel"),
)
class CompareRun:
    """Evaluation, checkpoints, run directory and device."""

    save_every_steps: int = RunConfig.save_every_steps
    """Steps between checkpoints, deleted when the method has finished; 0: at each evaluation."""
    samples: int = RunConfig.samples
    """Validation prompts that the base model and each method answer greedily; 0 disables
    samples."""


def compare(
    data: TrainingData,
    *,
    model: Model = None,
    implementation: Implementation = "auto",
    eval_data: ValidationData = None,
    same: SameAmount = CompareConfig.same,
    peft: Peft = False,
    resume: Resume = False,
    report: Report = True,
    devices: Devices = None,
    json: Json = False,
    rates: Annotated[RateFlags | None, Flat] = None,
    measures: Annotated[EvaluationFlags | None, Flat] = None,
    lora: Annotated[LoRAFlags | None, Flat] = None,
    train: Annotated[TrainFlags | None, Flat] = None,
    data_config: Annotated[DataFlags | None, Flat] = None,
    run: Annotated[CompareRun | None, Flat] = None,
    base: Annotated[BaseFlags | None, Flat] = None,
) -> int | Processes:
    """Compare LoRA with full fine-tuning: same base model, same batches.

    For example:

        lora compare --data orders.jsonl
        lora compare --data orders.jsonl --rates 3e-4,1e-3,3e-3 --peft
        lora compare --data orders.jsonl --same time --name fair
        lora compare --name fair --resume
        lora compare --data orders.jsonl --devices 2
        lora compare --data orders.jsonl --base-dtype nf4 --peft

    Reports training time, peak memory, sizes on disk, validation loss, loss on
    an unrelated text (forgetting), sample answers and, with --metric, a score.
    Each method is trained in a subprocess, so that its peak memory is its own.
    Several devices train each method together.
    """
    run_config = config_from(RunConfig, run or CompareRun())
    evaluation = config_from(EvaluationConfig, measures or EvaluationFlags())
    methods: tuple[Method, ...] = ("lora", "full", "peft") if peft else ("lora", "full")
    config = CompareConfig(
        train=config_from(TrainConfig, train or TrainFlags()),
        run=run_config,
        rates=config_from(LearningRates, rates or RateFlags()),
        methods=methods,
        same=same,
        resume=resume,
    )
    lora_config = config_from(LoRAConfig, lora or LoRAFlags())
    how_read = config_from(DataConfig, data_config or DataFlags())

    from lora.compare.decoder_target import DecoderTarget
    from lora.compare.run import compare as run_comparison
    from lora.report import report_on
    from lora.runs.progress import RichProgress

    target = DecoderTarget(
        data=data,
        model=model,
        implementation=implementation,
        eval_data=eval_data,
        lora=lora_config,
        data_config=how_read,
        evaluation=evaluation,
        **vars(base or BaseFlags()),
    )
    if not resume:
        target.check_split()
    if processes := processes_to_start(devices, run_config.device):
        return processes
    done = run_comparison(target, config, RichProgress)  # told on standard error
    tell = RichProgress("report").message
    page = report_on(done.folder, tell, with_page=report) if is_main_process() else None
    return _report(done, page, json)


def _report(done: CompareResult, page: Path | None, json: bool) -> int:
    if json:
        found = read_json(done.folder / COMPARE_FILE)
        report = None if page is None else str(page)
        print(json_text({"folder": str(done.folder), "report": report, **found}))
        return 0

    from lora.compare.table import print_comparison

    print_comparison(done.comparison, build_console())
    print_line(f"results: {done.folder}")
    if page is not None:
        print_line(f"report: {page}")
    return 0
