"""Summaries of single runs: finetune jobs, candidates, members, runs of training.py."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora.report.records.command import finetune_command
from lora.report.records.next_commands import next_commands
from lora.report.records.reading import count_elements, flatten, relative
from lora.report.records.records import NOT_QUANTISED, Memory, Point, RunSummary, StepState
from lora.runs.comparison_record import Sample
from lora.runs.read_record import (
    read_metrics,
    read_result,
    read_run_record,
    read_samples,
    read_timings,
)
from lora.runs.record import RUN_FILE, MetricsRow, RunRecord, RunResult, TimingRow
from lora.runs.typed_json import Faults, parse, to_json

MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "loss", "other")
_SETTINGS = (
    "learning_rate",
    "lora",
    "train",
    "data_config",
    "run",
    "settings",
    "deterministic",
    "from_adapter",
    "base_dtype",
    "nf4",
)
_NO_SETTINGS = ("run.name", "run.out", "train.learning_rate", "lora.init_seed")
"""Not shown as settings: where the run is stored, and what has a column of its own."""


@dataclass(frozen=True)
class _LoRASection:
    """What a report reads of the record's section `lora`."""

    rank: int | None = None
    alpha: float | None = None


@dataclass(frozen=True)
class _TrainSection:
    """What a report reads of the record's section `train`."""

    steps: int | None = None
    learning_rate: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class _SettingsSection:
    """What a report reads of the record's section `settings`, of training.py."""

    steps: int | None = None
    learning_rate: float | None = None
    seed: int | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None


def read_run(folder: Path, base: Path, faults: Faults, *, group: str = "") -> RunSummary:
    """Return the summary of the run in `folder`; `base` is the report's directory.

    An unfinished run is read as far as it is. What is damaged is added to `faults`, each with the
    file's name.
    """
    record = read_run_record(folder, faults)
    result = read_result(folder, faults)
    metrics = sorted(read_metrics(folder, faults), key=lambda row: row.step)
    timings = sorted(read_timings(folder, faults), key=lambda row: row.step)
    elapsed = _elapsed(timings)
    held_out = _points([(row.step, row.eval_loss) for row in metrics], elapsed)
    training = _points([(row.step, row.loss) for row in metrics], elapsed)
    best = min(held_out, key=lambda point: point.loss, default=None)
    not_finite = _not_finite(metrics)
    trained, total = _parameters(folder, record, result, faults)
    return RunSummary(
        name=f"{group}/{folder.name}" if group else folder.name,
        label=folder.name,
        folder=relative(folder, base),
        method=record.method or "unknown",
        status="unfinished" if result is None else "finished",
        group=group,
        model=record.model or record.base,
        device=_device(record),
        **_configuration(record, str(folder / RUN_FILE), faults),
        steps=result.steps if result else max((row.step for row in metrics), default=None),
        eval_loss=held_out[-1].loss if held_out and not_finite is None else None,
        best_eval_loss=best.loss if best else None,
        best_step=best.step if best else None,
        start_eval_loss=next((point.loss for point in held_out if point.step == 0), None),
        **_saved(result),
        **_speed(metrics, timings, result),
        peak_memory_bytes=_peak(timings, result),
        trainable_parameters=trained,
        total_parameters=total,
        stored_bytes=_stored_bytes(folder),
        held_out=held_out,
        training=training,
        course=_course(metrics),
        memory=_memory(result),
        samples=_samples(folder, faults),
        settings=_settings(record),
        data=_data(record),
        environment={} if record.environment is None else flatten(_sorted(record.environment)),
        base_fingerprint=record.base_fingerprint,
        stored_base=_stored_base(record),
        notes=(record.data.warnings or ())
        + (() if not_finite is None else (not_finite,))
        + (result.warnings if result else ()),
        command=None if group else finetune_command(record, folder.name),
        **({} if group or result is None else _next(folder, record)),
    )


def _next(folder: Path, record: RunRecord) -> dict[str, Any]:
    """Return where a finished run of lora finetune saved, and the commands that use it."""
    saved = next((path for name in ("adapter", "model") if (path := folder / name).is_dir()), None)
    if saved is None or record.kind != "finetune":
        return {}
    return {
        "saved": str(saved),
        "next_commands": tuple(next_commands(saved, record.model_source, has_gguf=record.has_gguf)),
    }


def _configuration(record: RunRecord, path: str, faults: Faults) -> dict[str, Any]:
    """Return rank, alpha, learning rate, seed and steps."""
    lora = parse(_LoRASection, record.lora or {}, f"{path}: lora", faults) or _LoRASection()
    train = parse(_TrainSection, record.train or {}, f"{path}: train", faults) or _TrainSection()
    where = f"{path}: settings"
    own = parse(_SettingsSection, record.settings or {}, where, faults) or _SettingsSection()
    is_lora = record.method in ("lora", "peft")
    rates = (record.learning_rate, train.learning_rate, own.learning_rate)
    return {
        "rank": lora.rank or own.lora_rank if is_lora else None,
        "alpha": lora.alpha or own.lora_alpha if is_lora else None,
        "learning_rate": next((r for r in rates if r is not None and math.isfinite(r)), None),
        "seed": train.seed if train.seed is not None else own.seed,
        "total_steps": train.steps or own.steps,
    }


def _device(record: RunRecord) -> str | None:
    if record.world_size is None or record.device is None:
        return record.device
    how = "" if record.parallel is None else f" ({record.parallel})"
    return f"{record.world_size} processes{how}, rank 0 on {record.device}"


def _elapsed(timings: Sequence[TimingRow]) -> dict[int, float]:
    """Return the seconds in steps at the end of each step; step 0 is the start."""
    known = [(row.step, row.step_s) for row in timings if row.step_s is not None]
    sums = itertools.accumulate(seconds for _, seconds in known)
    found = {step: total for (step, _), total in zip(known, sums, strict=True)}
    return {0: 0.0, **found} if found else {}


def _saved(result: RunResult | None) -> dict[str, Any]:
    """Return which weights were saved, and whether the run stopped early."""
    if result is None:
        return {}
    loss = result.saved_eval_loss
    return {
        "saved_step": result.saved_step,
        "saved_eval_loss": loss if loss is not None and math.isfinite(loss) else None,
        "stopped_early": result.stopped_early,
    }


def _points(
    losses: Sequence[tuple[int, float | None]], elapsed: dict[int, float]
) -> tuple[Point, ...]:
    return tuple(
        Point(step, loss, elapsed.get(step))
        for step, loss in losses
        if loss is not None and math.isfinite(loss)
    )


def _course(metrics: Sequence[MetricsRow]) -> tuple[StepState, ...]:
    return tuple(
        StepState(row.step, row.learning_rate, row.gradient_norm)
        for row in metrics
        if row.learning_rate is not None or row.gradient_norm is not None
    )


def _not_finite(metrics: Sequence[MetricsRow]) -> str | None:
    """Return a note if the newest validation loss is not finite."""
    evaluated = [r for r in metrics if r.eval_loss is not None or r.eval_not_finite is not None]
    if not evaluated or evaluated[-1].eval_not_finite is None:
        return None
    newest = evaluated[-1]
    return f"The validation loss at step {newest.step} is {newest.eval_not_finite}, not finite."


def _speed(
    metrics: Sequence[MetricsRow], timings: Sequence[TimingRow], result: RunResult | None
) -> dict[str, Any]:
    """Return the median time of a step, the time in all steps, and tokens per second."""
    times = [row.step_s for row in timings if row.step_s is not None]
    train_s = result.train_s if result else sum(times) if times else None
    seen = [row.tokens for row in metrics if row.tokens is not None]
    tokens = result.n_tokens if result else max(seen, default=None)
    return {
        "step_s": statistics.median(times) if times else None,
        "train_s": train_s,
        "tokens_per_s": tokens / train_s if tokens and train_s else None,
    }


def _peak(timings: Sequence[TimingRow], result: RunResult | None) -> int | None:
    """Return the peak of all steps, those before a resume too."""
    seen = [row.peak_memory_bytes or 0 for row in timings]
    return max([*seen, result.peak_memory_bytes if result else 0]) or None


def _parameters(
    folder: Path, record: RunRecord, result: RunResult | None, faults: Faults
) -> tuple[int | None, int | None]:
    """Return how many parameters train, and how many there are."""
    trained = total = None
    if result is not None and result.memory is not None:
        planned = result.memory.planned
        trained, total = planned.trained_parameters, planned.parameters
    if trained is None and result is not None and result.parameters is not None:  # training.py
        trained, base = result.parameters.trainable, result.parameters.base
        total = base if record.method == "full" else base + trained
    if trained is None:
        files = sorted((folder / "adapter").glob("*.safetensors"))
        counts = [n for file in files if (n := count_elements(file, faults)) is not None]
        trained = sum(counts) if counts else None
    if total is None and trained is not None and record.base_parameters is not None:
        total = record.base_parameters + trained
    return trained, total


def _stored_bytes(folder: Path) -> int | None:
    files = [f for name in ("adapter", "model") for f in (folder / name).glob("*.safetensors")]
    return sum(file.stat().st_size for file in files) or None


def _memory(result: RunResult | None) -> Memory | None:
    if result is None or result.memory is None:
        return None
    planned = asdict(result.memory.planned)
    parts = {name: planned[name] for name in MEMORY_PARTS}
    if planned["total"] is None or None in parts.values():
        return None
    return Memory(parts, planned["total"], result.memory.measured_bytes)


def _samples(folder: Path, faults: Faults) -> tuple[Sample, ...]:
    return tuple(
        Sample(
            step=row.step,
            prompt=row.prompt,
            answer=row.answer,
            expected=row.reference,
            is_cut=row.ended is False,
        )
        for row in sorted(read_samples(folder, faults), key=lambda row: row.step)
    )


def _settings(record: RunRecord) -> dict[str, Any]:
    kept = {name: v for name in _SETTINGS if (v := getattr(record, name)) is not None}
    return {k: v for k, v in flatten(kept).items() if k not in _NO_SETTINGS}


def _stored_base(record: RunRecord) -> str:
    """Return in words how the frozen weights were stored."""
    if record.base_dtype is None:
        return NOT_QUANTISED
    nf4 = record.nf4 or {}
    if "nf4_block" not in nf4:
        return record.base_dtype
    scales = "double quantisation" if nf4.get("nf4_double_quant") else "no double quantisation"
    tables = ", embeddings too" if nf4.get("nf4_embeddings") else ""
    return f"{record.base_dtype} (blocks of {nf4['nf4_block']}, {scales}{tables})"


def _data(record: RunRecord) -> dict[str, Any]:
    values = _sorted(record.data)
    values.pop("warnings", None)  # which are notes of the run
    return flatten(values)


def _sorted(record: Any) -> dict[str, Any]:
    return dict(sorted(to_json(record).items()))
