"""One run's folder as a record: of lora finetune, of a candidate, of a member, of training.py."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora.report.records.command import finetune_command
from lora.report.records.reading import (
    Faults,
    Values,
    count_elements,
    flatten,
    read_lines,
    read_object,
    relative,
)
from lora.report.records.records import Memory, Method, Point, RunRecord
from lora.runs.comparison_record import Sample
from lora.runs.directory import METRICS_FILE, SAMPLES_FILE, TIMINGS_FILE

RUN_FILE, RESULT_FILE = "run.json", "result.json"
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
)
_NO_SETTINGS = ("run.name", "run.out", "train.learning_rate", "lora.init_seed")
"""Where a run lies is no setting; the rate and the seed that were used stand beside."""


def read_run(folder: Path, base: Path, faults: Faults, *, group: str = "") -> RunRecord:
    """Return what `folder` tells of its run; `base` is where the report will lie.

    A run that is under way or was interrupted is read as it stands. What is damaged goes into
    `faults`, each with the file's name.
    """
    asked = read_object(folder / RUN_FILE, faults, required=True)
    result = read_object(folder / RESULT_FILE, faults)
    metrics = read_lines(folder / METRICS_FILE, faults)
    timings = read_lines(folder / TIMINGS_FILE, faults)
    elapsed = _elapsed(timings)
    held_out = _points(metrics, "eval_loss", elapsed)
    training = _points(metrics, "loss", elapsed)
    best = min(held_out, key=lambda point: point.loss, default=None)
    not_finite = _not_finite(metrics)
    trained, total = _parameters(folder, asked, result, faults)
    return RunRecord(
        name=f"{group}/{folder.name}" if group else folder.name,
        label=folder.name,
        folder=relative(folder, base),
        method=_method(asked),
        status="finished" if result.values else "unfinished",
        group=group,
        model=asked.text("model") or asked.text("base"),
        device=asked.text("device"),
        **_settings_of_method(asked),
        steps=result.count("steps") or _last_step(metrics),
        total_steps=_total_steps(asked),
        eval_loss=held_out[-1].loss if held_out and not_finite is None else None,
        best_eval_loss=best.loss if best else None,
        best_step=best.step if best else None,
        **_speed(metrics, timings, result),
        peak_memory_bytes=_peak(timings, result),
        trainable_parameters=trained,
        total_parameters=total,
        stored_bytes=_stored_bytes(folder),
        held_out=held_out,
        training=training,
        memory=_memory(result),
        samples=_samples(folder, faults),
        settings=_settings(asked),
        data={k: v for k, v in _data(asked).items() if k != "warnings"},
        environment=flatten(asked.section("environment").values),
        base_fingerprint=asked.text("base_fingerprint"),
        notes=_warnings(asked) + (() if not_finite is None else (not_finite,)),
        command=None if group else finetune_command(asked.values, folder.name),
    )


def _method(asked: Values) -> Method:
    named = asked.values.get("method")
    if named in ("lora", "full", "peft"):
        return named
    if isinstance(asked.values.get("settings"), dict):  # of training.py
        settings = asked.section("settings")
        adapts = settings.flag("use_lora") and asked.values.get("base") is not None
        return "lora" if adapts else "full"
    if "lora" not in asked.values:
        return "unknown"
    is_lora = asked.values["lora"] is not None or asked.values.get("from_adapter") is not None
    return "lora" if is_lora else "full"


def _settings_of_method(asked: Values) -> dict[str, Any]:
    """Return rank, alpha, rate and seed."""
    lora, train, settings = (asked.section(name) for name in ("lora", "train", "settings"))
    is_lora = _method(asked) in ("lora", "peft")
    rate = asked.number("learning_rate")
    rates = (train.number("learning_rate"), settings.number("learning_rate"))
    seeds = (train.count("seed"), settings.count("seed"))
    return {
        "rank": (lora.count("rank") or settings.count("lora_rank")) if is_lora else None,
        "alpha": (lora.number("alpha") or settings.number("lora_alpha")) if is_lora else None,
        "learning_rate": next((r for r in (rate, *rates) if r is not None), None),
        "seed": next((s for s in seeds if s is not None), None),
    }  # fmt: skip


def _total_steps(asked: Values) -> int | None:
    return asked.section("train").count("steps") or asked.section("settings").count("steps")


def _last_step(metrics: Sequence[Values]) -> int | None:
    return max((row.count("step") or 0 for row in metrics), default=None)


def _elapsed(timings: Sequence[Values]) -> dict[int, float]:
    """Return the seconds in steps at the end of each step; step 0 is the start."""
    timed = [(row.count("step") or 0, row.number("step_s")) for row in timings]
    known = [(step, seconds) for step, seconds in timed if seconds is not None]
    sums = itertools.accumulate(seconds for _, seconds in known)
    found = {step: total for (step, _), total in zip(known, sums, strict=True)}
    return {0: 0.0, **found} if found else {}


def _points(rows: Sequence[Values], name: str, elapsed: dict[int, float]) -> tuple[Point, ...]:
    found = []
    for row in rows:
        step, loss = row.count("step"), row.number(name)
        if step is not None and loss is not None:
            found.append(Point(step, loss, elapsed.get(step)))
    return tuple(found)


def _not_finite(metrics: Sequence[Values]) -> str | None:
    """Return a note if the newest held-out loss is not finite."""
    told = [row for row in metrics if {"eval_loss", "eval_not_finite"} & row.values.keys()]
    if not told or "eval_not_finite" not in told[-1].values:
        return None
    step, seen = told[-1].count("step"), told[-1].values["eval_not_finite"]
    return f"The held-out loss at step {step} is {seen}, not finite."


def _speed(metrics: Sequence[Values], timings: Sequence[Values], result: Values) -> dict[str, Any]:
    """Return the median of a step, the time in all steps, and tokens a second."""
    times = [s for row in timings if (s := row.number("step_s")) is not None]
    train_s = result.number("train_s") or (sum(times) if times else None)
    tokens = result.number("n_tokens") or max(
        (n for row in metrics if (n := row.number("tokens")) is not None), default=None
    )
    return {
        "step_s": statistics.median(times) if times else None,
        "train_s": train_s,
        "tokens_per_s": tokens / train_s if tokens and train_s else None,
    }


def _peak(timings: Sequence[Values], result: Values) -> int | None:
    """Return the peak of all steps, those before a resume too."""
    seen = [row.count("peak_memory_bytes") for row in (*timings, result)]
    return max((n for n in seen if n), default=None)


def _parameters(
    folder: Path, asked: Values, result: Values, faults: Faults
) -> tuple[int | None, int | None]:
    """Return how many parameters train, and how many there are."""
    planned = result.section("memory").section("planned")
    trained, total = planned.count("trained_parameters"), planned.count("parameters")
    if trained is None and isinstance(result.values.get("parameters"), dict):  # of training.py
        counted = result.section("parameters")
        trained, base = counted.count("trainable"), counted.count("base")
        if trained is not None and base is not None:
            total = base if _method(asked) == "full" else base + trained
    if trained is None:
        files = sorted((folder / "adapter").glob("*.safetensors"))
        counts = [n for file in files if (n := count_elements(file, faults)) is not None]
        trained = sum(counts) if counts else None
    base_parameters = asked.count("base_parameters")
    if total is None and trained is not None and base_parameters is not None:
        total = base_parameters + trained
    return trained, total


def _stored_bytes(folder: Path) -> int | None:
    files = [f for name in ("adapter", "model") for f in (folder / name).glob("*.safetensors")]
    return sum(file.stat().st_size for file in files) or None


def _memory(result: Values) -> Memory | None:
    memory = result.section("memory")
    planned = memory.section("planned")
    parts = {name: planned.count(name) for name in MEMORY_PARTS}
    total = planned.count("total")
    if total is None or any(part is None for part in parts.values()):
        return None
    known = {name: part for name, part in parts.items() if part is not None}
    return Memory(known, total, memory.count("measured_bytes"))


def _samples(folder: Path, faults: Faults) -> tuple[Sample, ...]:
    return tuple(
        Sample(
            step=row.count("step"),
            prompt=row.text("prompt") or "",
            answer=row.text("answer") or "",
            expected=row.text("reference"),
            is_cut=row.values.get("ended") is False,
        )
        for row in read_lines(folder / SAMPLES_FILE, faults)
    )


def _settings(asked: Values) -> dict[str, Any]:
    kept = {name: asked.values[name] for name in _SETTINGS if asked.values.get(name) is not None}
    return {k: v for k, v in flatten(kept).items() if k not in _NO_SETTINGS}


def _data(asked: Values) -> dict[str, Any]:
    data = asked.values.get("data")  # training.py says it in a line
    return flatten(data) if isinstance(data, dict) else {} if data is None else {"source": data}


def _warnings(asked: Values) -> tuple[str, ...]:
    data = asked.values.get("data")
    return asked.section("data").texts("warnings") if isinstance(data, dict) else ()
