"""`lora compare`: LoRA beside full fine-tuning, with the same measures."""

from __future__ import annotations

import json as json_format
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lora.compare.config import CompareConfig, LearningRates
from lora.compare.decoder_job import EvaluationConfig, Metric
from lora.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.errors import ConfigError
from lora.runs.comparison_record import COMPARE_FILE, Same
from lora.runs.disk import read_json
from lora.runs.record import Method

if TYPE_CHECKING:
    from lora.compare.run import CompareResult

Flat = Parameter(name="*")


@dataclass(frozen=True)
class EvaluationFlags:
    """What is measured besides speed, memory and held-out loss."""

    forgetting_data: Path | None = None
    """Another text than the one that is learned, whose loss is measured before and after; left out,
    prose that every Python has."""
    metric: Metric = EvaluationConfig.metric
    """Score of answers: exact-match, or json-fields (those of a JSON object that are right)."""
    test_data: Path | None = None
    """Examples that are answered for the metric; left out, the held-out ones."""
    answers: int = EvaluationConfig.answers
    """At most so many of them are answered."""
    answer_tokens: int = EvaluationConfig.answer_tokens
    """Most tokens of such an answer."""


@dataclass(frozen=True)
class CompareRun:
    """Where the results go and how often the members are measured."""

    out: Path = RunConfig.out
    """Folder that holds the runs."""
    name: str | None = RunConfig.name
    """Name of this comparison's folder; left out, one from the date and the model."""
    eval_every_steps: int = RunConfig.eval_every_steps
    """Steps between evaluations; 0 makes at most ten, at least ten steps apart."""
    save_every_steps: int = RunConfig.save_every_steps
    """Steps between checkpoints; 0 saves at each evaluation. They go when a member is done."""
    samples: int = RunConfig.samples
    """Held-out prompts that the base and each member answer, greedily; 0: none."""
    sample_tokens: int = RunConfig.sample_tokens
    """Most tokens of such an answer."""
    device: str = RunConfig.device
    """auto, cpu, cuda, cuda:1 …"""
    fast: bool = RunConfig.fast
    """Take the fast step where it can train the model; false always takes the plain one."""


def compare(
    *,
    data: Path,
    model: str | None = None,
    eval_data: Path | None = None,
    same: Same = CompareConfig.same,
    peft: bool = False,
    resume: bool = False,
    report: bool = True,
    json: bool = False,
    rates: Annotated[LearningRates | None, Flat] = None,
    measures: Annotated[EvaluationFlags | None, Flat] = None,
    lora: Annotated[LoRAConfig | None, Flat] = None,
    train: Annotated[TrainConfig | None, Flat] = None,
    data_config: Annotated[DataConfig | None, Flat] = None,
    run: Annotated[CompareRun | None, Flat] = None,
) -> int:
    """Train through LoRA and train all weights, from the same base on the same batches.

    Examples:

        lora compare --data orders.jsonl
        lora compare --data orders.jsonl --rates 3e-4,1e-3,3e-3 --metric json-fields --peft
        lora compare --data orders.jsonl --same time --name fair
        lora compare --data orders.jsonl --same time --name fair --resume

    Each member is a process of its own, so that its peak of memory is its own. Measured are time,
    memory, bytes, held-out loss, loss on another text, answers, and a metric if one is named.

    Parameters
    ----------
    data
        File or folder of examples.
    model
        As in lora finetune; left out, SmolLM2-135M-Instruct.
    eval_data
        Examples to measure on; left out, some of the data are held out.
    same
        What the members share: steps, or time (as many steps as LoRA's time in steps holds).
    peft
        Also LoRA by PEFT, on transformers' model.
    resume
        Go on with the comparison called --name: what is done stays, what was under way goes on.
    report
        Write report.html, report.json and pictures into the comparison's folder at the end.
    json
        Print the result as one JSON object.
    """
    from lora.compare.decoder_target import DecoderTarget
    from lora.compare.run import compare as run_comparison
    from lora.report import report_on
    from lora.runs.progress import RichProgress

    if resume and (run is None or run.name is None):
        raise ConfigError("--resume was given without --name: name the comparison to go on with.")
    target = DecoderTarget(
        data=data,
        model=model,
        eval_data=eval_data,
        lora=lora or LoRAConfig(),
        data_config=data_config or DataConfig(),
        evaluation=EvaluationConfig(**vars(measures or EvaluationFlags())),
    )
    methods: tuple[Method, ...] = ("lora", "full", "peft") if peft else ("lora", "full")
    config = CompareConfig(
        train=train or TrainConfig(),
        run=RunConfig(**vars(run or CompareRun())),
        rates=rates or LearningRates(),
        methods=methods,
        same=same,
        resume=resume,
    )
    done = run_comparison(target, config, RichProgress)  # told on standard error
    page = report_on(done.folder, RichProgress("report").message, with_page=report)
    return _report(done, page, json)


def _report(done: CompareResult, page: Path | None, json: bool) -> int:
    if json:
        found = read_json(done.folder / COMPARE_FILE)
        report = None if page is None else str(page)
        print(json_format.dumps({"folder": str(done.folder), "report": report, **found}))
        return 0
    from rich.console import Console

    from lora.compare.table import print_comparison

    print_comparison(done.comparison, Console(highlight=False))
    print(f"all of it: {done.folder}")
    if page is not None:
        print(f"report: {page}")
    return 0
