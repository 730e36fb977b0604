"""`lora sweep`: train every combination of settings together, keep the best adapter."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lora.cli.flags.from_fields import (
    COMPARED,
    Flat,
    config_from,
    flags_from,
)
from lora.cli.flags.shared import (
    BaseFlags,
    DataFlags,
    Deterministic,
    Devices,
    Implementation,
    Json,
    Model,
    Report,
    Resume,
    TrainingData,
    ValidationData,
)
from lora.cli.results.program import program
from lora.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.distributed.launch import Processes, processes_to_start
from lora.distributed.ranks import is_main_process
from lora.errors import ConfigError
from lora.runs.read_record import read_run_record
from lora.runs.typed_json import json_text
from lora.sweep.grid import SWEPT, Grid
from lora.terminal import build_console, print_line

if TYPE_CHECKING:
    from lora.compare.sweep_full import FullResult
    from lora.data.inspection_report import DataReport
    from lora.sweep.run import SweepResult

AtOnce = Annotated[
    int | None,
    Parameter(
        group=COMPARED,
        help="Candidates trained together on each device, the others in waves. Default: as many as "
        "fit.",
    ),
]
Halving = Annotated[
    bool,
    Parameter(
        group=COMPARED,
        help="Successive halving: stop the worse half after a quarter and after half of the steps.",
    ),
]
Full = Annotated[
    bool,
    Parameter(
        group=COMPARED,
        help="Also run full fine-tuning on the same batches and show it in the table.",
    ),
]
FullLearningRate = Annotated[
    float | None,
    Parameter(group=COMPARED, help="Peak learning rate of --full. Default: 1e-4."),
]


@flags_from(Grid)
class GridFlags:
    """The values whose combinations are the candidates."""


@flags_from(LoRAConfig, without=(*SWEPT, "rank_pattern", "alpha_pattern", "init_seed"))
class SweepLoRA:
    """LoRA settings that all candidates share."""


@flags_from(TrainConfig, without=SWEPT)
class SweepTrain:
    """Training settings that all candidates share; sizes are those of one candidate."""


@flags_from(
    RunConfig,
    without=(
        *("keep_checkpoints", "patience", "samples", "sample_tokens"),
        *("skip_nonfinite", "tensorboard", "parallel"),
    ),
)
class SweepRun:
    """Evaluation, run directory and device."""

    eval_every_steps: int = RunConfig.eval_every_steps
    """Steps between evaluations; 0: at most ten in a run, at least ten steps apart.

    The end is always evaluated."""


def sweep(
    data: TrainingData,
    *,
    model: Model = None,
    implementation: Implementation = "auto",
    eval_data: ValidationData = None,
    at_once: AtOnce = None,
    halving: Halving = False,
    full: Full = False,
    full_learning_rate: FullLearningRate = None,
    resume: Resume = False,
    report: Report = True,
    devices: Devices = None,
    deterministic: Deterministic = False,
    json: Json = False,
    grid: Annotated[GridFlags | None, Flat] = None,
    lora: Annotated[SweepLoRA | None, Flat] = None,
    train: Annotated[SweepTrain | None, Flat] = None,
    data_config: Annotated[DataFlags | None, Flat] = None,
    run: Annotated[SweepRun | None, Flat] = None,
    base: Annotated[BaseFlags | None, Flat] = None,
) -> int | Processes:
    """Train an adapter for every combination of values, many in one pass.

    For example:

        lora sweep --data orders.jsonl --rank 4,8,16 --learning-rate 3e-4,1e-3
        lora sweep --data orders.jsonl --rank 4,16 --alpha 2r --seed 0,1 --halving
        lora sweep --name ranks --resume
        lora sweep --data orders.jsonl --rank 4,8,16 --full
        lora sweep --data orders.jsonl --rank 4,8 --seed 0,1,2,3 --devices 2
        lora sweep --data orders.jsonl --rank 4,8,16 --base-dtype nf4

    Each candidate is the adapter that lora finetune trains with these settings.
    Of each the weights with its lowest validation loss are saved, in candidates/,
    and the adapter with the lowest of all in best/; the report is report.html.
    Several devices share the candidates.
    """
    run_config = config_from(RunConfig, run or SweepRun())
    _check_full(full, full_learning_rate)
    candidates = config_from(Grid, grid or GridFlags())
    lora_config = config_from(LoRAConfig, lora or SweepLoRA())
    train_config = config_from(TrainConfig, train or SweepTrain())
    how_read = config_from(DataConfig, data_config or DataFlags())

    from lora.compare.sweep_full import sweep_with_full
    from lora.data.inspection_view import print_report
    from lora.report import report_on
    from lora.report.records.next_commands import next_commands
    from lora.runs.progress import RichProgress
    from lora.sweep.job import SweepJob
    from lora.sweep.progress import RichSweepProgress
    from lora.sweep.run import check_before_processes
    from lora.sweep.run import sweep as run_job

    job = SweepJob(
        data=data,
        grid=candidates,
        model=model,
        implementation=implementation,
        eval_data=eval_data,
        lora=lora_config,
        train=train_config,
        data_config=how_read,
        run=run_config,
        at_once=at_once,
        halving=halving,
        resume=resume,
        **vars(base or BaseFlags()),
        deterministic=deterministic,
    )
    if processes := processes_to_start(devices, run_config.device):
        check_before_processes(job)
        return processes
    progress = RichSweepProgress()  # on standard error: the result alone goes to the other

    def show_data(report: DataReport) -> None:
        print_report(report, progress.console, is_compact=True)

    beside: FullResult | None = None
    if full:
        bar = RichProgress("full fine-tuning")
        done, beside = sweep_with_full(
            job, progress, full_learning_rate, show_data=show_data, full_progress=bar
        )
    else:
        done = run_job(job, progress, show_data=show_data)
    is_main = is_main_process()
    page = report_on(done.folder, progress.message, with_page=report) if is_main else None
    has_gguf = read_run_record(done.folder).has_gguf
    commands = next_commands(done.best, model, program(), has_gguf=has_gguf)
    return _report(done, beside, job.grid.swept(), page, commands, json)


def _check_full(full: bool, rate: float | None) -> None:
    if rate is None:
        return
    if not full:
        raise ConfigError(
            "Cannot use --full-learning-rate without --full, whose learning rate it is. Add --full."
        )
    if not rate > 0:
        raise ConfigError(f"Cannot use --full-learning-rate {rate}. Allowed: a number > 0.")


def _report(
    done: SweepResult,
    full: FullResult | None,
    swept: tuple[str, ...],
    page: Path | None,
    commands: list[str],
    json: bool,
) -> int:
    if json:
        found = {"folder": str(done.folder), "best": str(done.best)}
        found_all = {
            "candidates": [asdict(state) for state in done.candidates],
            "train_s": done.train_s,
            "peak_memory_bytes": done.peak_memory_bytes,
            "full": None if full is None else _full_values(full),
            "report": None if page is None else str(page),
            "next": commands,
        }
        print(json_text({**found, **found_all}))
        return 0

    from lora.sweep.progress import candidates_table, format_status

    names = tuple(dict.fromkeys((*swept, "rank", "learning_rate"))) if full else swept
    states = done.candidates if full is None else [*done.candidates, full.record.candidate]
    build_console().print(candidates_table(states, names))
    for state in states:
        if state.reason:
            print_line(f"{state.name} {format_status(state)}")
    if full is not None:
        print_line(
            f"full fine-tuning: {full.record.train_s:.0f} s of training, peak memory "
            f"{full.record.peak_memory_bytes / 1e9:.2f} GB, in {full.folder}"
        )
    print_line(
        f"{done.train_s:.0f} s of training, peak memory {done.peak_memory_bytes / 1e9:.2f} GB\n"
        f"best: {done.best}\nall: {done.folder / 'candidates'}"
    )
    if page is not None:
        print_line(f"report: {page}")
    print_line("\n".join(["next:", *(f"  {command}" for command in commands)]))
    return 0


def _full_values(full: FullResult) -> dict[str, Any]:
    """Return what --json has of full fine-tuning: its candidate is called `standing` there."""
    record = full.record
    return {
        "folder": str(full.folder),
        "standing": asdict(record.candidate),
        "train_s": record.train_s,
        "peak_memory_bytes": record.peak_memory_bytes,
        "stored_bytes": record.stored_bytes,
    }
