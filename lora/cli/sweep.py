"""`lora sweep`: many settings at once, the best adapter out."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lora.config import DataConfig, LoRAConfig, Precision, RunConfig, TrainConfig
from lora.errors import ConfigError
from lora.sweep.grid import Grid

if TYPE_CHECKING:
    from lora.compare.sweep_full import FullResult
    from lora.data.inspection_report import DataReport
    from lora.sweep.run import SweepResult

Flat = Parameter(name="*")


@dataclass(frozen=True)
class SharedLoRA:
    """What the adapters of all candidates share."""

    targets: str | tuple[str, ...] = LoRAConfig.targets
    """Which linears to adapt: "all-linear" (all but the output head), name endings such as
    q_proj, full names, or one regular expression that must match the whole name."""
    exclude: tuple[str, ...] = LoRAConfig.exclude
    """Name endings or full names that are left alone although `targets` takes them in."""
    modules_to_save: tuple[str, ...] = LoRAConfig.modules_to_save
    """Name endings of modules that train whole and are saved with the adapter (embeddings)."""
    rslora: bool = LoRAConfig.rslora
    """Scale by alpha / sqrt(rank) (arXiv 2312.03732)."""
    layers: tuple[int, ...] | None = LoRAConfig.layers
    """Numbers of the blocks to adapt; left out, all."""


@dataclass(frozen=True)
class SharedTrain:
    """What the training of all candidates shares."""

    steps: int = TrainConfig.steps
    """Optimizer steps of each candidate."""
    batch_size: int = TrainConfig.batch_size
    """Rows of one optimizer step of one candidate, over all micro-batches."""
    micro_batches: int = TrainConfig.micro_batches
    """Parts that a step's rows are split into to save memory; the result is the same."""
    whole_rate_fraction: float = TrainConfig.whole_rate_fraction
    """Beside LoRA, the rate of what trains whole (embeddings), as a share of LoRA's."""
    warmup_fraction: float = TrainConfig.warmup_fraction
    """Share of `steps` over which the rate rises from zero."""
    min_rate_fraction: float = TrainConfig.min_rate_fraction
    """Where cosine and linear end, as a share of the peak rate."""
    weight_decay: float = TrainConfig.weight_decay
    """AdamW's decoupled decay; norms, biases and embeddings get none."""
    max_grad_norm: float = TrainConfig.max_grad_norm
    """Each candidate's gradient is scaled down to this norm; 0 leaves it alone."""
    precision: Precision = TrainConfig.precision
    """Type of the products: auto takes bf16 where the device is good at it."""


@dataclass(frozen=True)
class SweepRun:
    """Where the results go and how often the candidates are measured."""

    out: Path = RunConfig.out
    """Folder that holds the runs."""
    name: str | None = RunConfig.name
    """Name of this sweep's folder; left out, one from the date and the model."""
    eval_every_steps: int = RunConfig.eval_every_steps
    """Steps between evaluations; 0 makes at most ten in a run, at least ten steps apart. The end
    is always evaluated."""
    save_every_steps: int = RunConfig.save_every_steps
    """Steps between checkpoints; 0 saves at each evaluation."""
    device: str = RunConfig.device
    """auto, cpu, cuda, cuda:1 …"""
    fast: bool = RunConfig.fast
    """On a GPU, train the candidates through the fast stacked step where it can be; --no-fast
    takes the plain one."""


def sweep(
    *,
    data: Path,
    model: str | None = None,
    eval_data: Path | None = None,
    at_once: int | None = None,
    halving: bool = False,
    full: bool = False,
    full_learning_rate: float | None = None,
    resume: bool = False,
    report: bool = True,
    deterministic: bool = False,
    json: bool = False,
    grid: Annotated[Grid | None, Flat] = None,
    lora: Annotated[SharedLoRA | None, Flat] = None,
    train: Annotated[SharedTrain | None, Flat] = None,
    data_config: Annotated[DataConfig | None, Flat] = None,
    run: Annotated[SweepRun | None, Flat] = None,
) -> int:
    """Train many adapters at once on one frozen base, and keep the best.

    Examples:

        lora sweep --data orders.jsonl --rank 4,8,16,32 --learning-rate 1e-4,3e-4,1e-3
        lora sweep --data orders.jsonl --rank 4,16 --alpha 2r --seed 0,1,2 --halving
        lora sweep --data orders.jsonl --rank 4,8 --name ranks --resume
        lora sweep --data orders.jsonl --rank 4,8,16 --full

    Every combination of the values is a candidate. Each becomes the adapter that lora finetune
    would make with the same settings. The best one, by held-out loss at the end, is in best/, all
    of them under candidates/, their losses in loss.png and report.html.

    Parameters
    ----------
    data
        File or folder of examples.
    model
        As in lora finetune; left out, SmolLM2-135M-Instruct.
    eval_data
        Examples to compare by; left out, some of the data are held out.
    at_once
        Candidates that train together; left out, as many as fit into memory. The others follow in
        waves.
    halving
        Stop the worse half at a quarter of the steps, and again at half of them; their places go to
        those that are left.
    full
        Also train all weights, on the same data in the same order, and put that into the table.
    full_learning_rate
        The peak rate of it; left out, 1e-4.
    resume
        Go on with the sweep called --name, after a kill for example.
    report
        Write report.html, report.json and pictures into the sweep's folder at the end.
    deterministic
        Make a second sweep on the same GPU end with the same bits: slower, through the plain step.
    json
        Print the result as one JSON object.
    """
    from lora.compare.sweep_full import sweep_with_full
    from lora.data.inspection_view import print_report
    from lora.report import report_on
    from lora.runs.progress import RichProgress
    from lora.sweep.job import SweepJob
    from lora.sweep.progress import RichSweepProgress
    from lora.sweep.run import sweep as run_job

    _check_full(full, full_learning_rate)

    if resume and (run is None or run.name is None):
        raise ConfigError("--resume was given without --name: name the sweep to go on with.")
    job = SweepJob(
        data=data,
        grid=grid or Grid(),
        model=model,
        eval_data=eval_data,
        lora=LoRAConfig(**vars(lora or SharedLoRA())),
        train=TrainConfig(**vars(train or SharedTrain())),
        data_config=data_config or DataConfig(),
        run=RunConfig(**vars(run or SweepRun())),
        at_once=at_once,
        halving=halving,
        resume=resume,
        deterministic=deterministic,
    )
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
    page = report_on(done.folder, progress.message, with_page=report)
    return _report(done, beside, job.grid.swept(), page, json)


def _check_full(full: bool, rate: float | None) -> None:
    if rate is None:
        return
    if not full:
        raise ConfigError("--full-learning-rate is the rate of --full: give that too.")
    if not rate > 0:
        raise ConfigError(f"--full-learning-rate {rate}: allowed is a number > 0. Change it.")


def _report(
    done: SweepResult,
    full: FullResult | None,
    swept: tuple[str, ...],
    page: Path | None,
    json: bool,
) -> int:
    if json:
        found = {"folder": str(done.folder), "best": str(done.best)}
        found_all = {
            "candidates": [asdict(state) for state in done.candidates],
            "train_s": done.train_s,
            "peak_memory_bytes": done.peak_memory_bytes,
            "full": None if full is None else {**asdict(full), "folder": str(full.folder)},
            "report": None if page is None else str(page),
        }
        print(json_format.dumps({**found, **found_all}))
        return 0
    from rich.console import Console

    from lora.sweep.progress import candidates_table

    names = tuple(dict.fromkeys((*swept, "rank", "learning_rate"))) if full else swept
    states = done.candidates if full is None else [*done.candidates, full.standing]
    Console(highlight=False).print(candidates_table(states, names))
    if full is not None:
        print(
            f"full fine-tuning: {full.train_s:.0f} s of training, peak memory "
            f"{full.peak_memory_bytes / 1e9:.2f} GB, in {full.folder}"
        )
    print(
        f"{done.train_s:.0f} s of training, peak memory {done.peak_memory_bytes / 1e9:.2f} GB\n"
        f"best: {done.best}\nall: {done.folder / 'candidates'}"
    )
    if page is not None:
        print(f"report: {page}")
    return 0
