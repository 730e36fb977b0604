"""A comparison's folder as records: its members, and how LoRA stands to the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora.report.records.command import comparison_command
from lora.report.records.reading import Faults, Values, read_object, relative
from lora.report.records.records import (
    METHOD_NAMES,
    Change,
    ComparisonRecord,
    MemberRecord,
    Method,
    RateTried,
    Ratios,
    RunRecord,
    Sample,
    SweepRecord,
)
from lora.report.records.runs import RUN_FILE, read_run

COMPARE_FILE, MEMBERS = "compare.json", "members"


def read_comparison(
    folder: Path, base: Path, name: str, faults: Faults
) -> tuple[ComparisonRecord, list[RunRecord]]:
    """Return what `folder` tells of its comparison, and its members' runs.

    One that is under way has no `compare.json` yet: its members are read as they stand.
    """
    asked = read_object(folder / RUN_FILE, faults, required=True)
    found = read_object(folder / COMPARE_FILE, faults)
    runs, members = [], []
    for row in found.items("members"):
        own = row.text("folder")
        if own is None or not (folder / own / RUN_FILE).is_file():
            faults.append(f"{row.where}: the member's folder {own!r} holds no run.")
            continue
        run = _member_run(read_run(folder / own, base, faults, group=name), row)
        runs.append(run)
        members.append(_member(run, row))
    if not found.values:
        inside = sorted(path.parent for path in (folder / MEMBERS).glob(f"*/{RUN_FILE}"))
        runs = [_unfinished(read_run(own, base, faults, group=name)) for own in inside]
    record = ComparisonRecord(
        name=name,
        folder=relative(folder, base),
        status="finished" if found.values else "unfinished",
        base=found.text("base") or asked.text("model"),
        same=found.text("same") or asked.section("compare").text("same"),
        base_eval_loss=found.number("base_eval_loss"),
        rate_steps=found.count("rate_steps"),
        members=tuple(members),
        base_samples=tuple(_sample(row) for row in found.items("base_samples")),
        notes=found.texts("notes"),
        command=comparison_command(asked.values, folder.name),
    )
    return record, runs


def find_ratios(
    runs: Sequence[RunRecord], sweeps: Sequence[SweepRecord] = ()
) -> tuple[Ratios, ...]:
    """Return each LoRA run against what it can be compared with.

    In a comparison that is every other member, in a sweep its best against full fine-tuning. Among
    runs that stand alone it is the one that trained all weights; with several of those nobody can
    say which is meant.
    """
    found = []
    best = {sweep.name: sweep.best for sweep in sweeps}
    for group in dict.fromkeys(run.group for run in runs):
        members = [run for run in runs if run.group == group]
        others = [
            run for run in members if run.method in (("full", "peft") if group else ("full",))
        ]
        if group == "" and len(others) != 1:
            continue
        ours = [run for run in members if run.method == "lora"]
        if group in best:
            ours = [run for run in ours if run.name == best[group]]
        found += [_ratios(one, other) for one in ours for other in others]
    return tuple(found)


def _ratios(one: RunRecord, other: RunRecord) -> Ratios:
    saved = _quotient(one.peak_memory_bytes, other.peak_memory_bytes)
    both_end = one.eval_loss is not None and other.eval_loss is not None
    return Ratios(
        run=one.name,
        against=other.name,
        step_speed=_quotient(other.step_s, one.step_s),
        total_speed=_quotient(other.train_s, one.train_s),
        memory_saved=None if saved is None else 1 - saved,
        trainable_fraction=_quotient(one.trainable_parameters, other.trainable_parameters),
        stored_fraction=_quotient(one.stored_bytes, other.stored_bytes),
        loss_difference=one.eval_loss - other.eval_loss if both_end else None,  # type: ignore[operator]
    )


def _quotient(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def _unfinished(run: RunRecord) -> RunRecord:
    return replace(run, label=METHOD_NAMES[run.method])


def _member_run(run: RunRecord, row: Values) -> RunRecord:
    """Return a member's run with what the comparison measured of it."""
    method: Method = run.method
    if row.text("method") in METHOD_NAMES:
        method = row.text("method")  # type: ignore[assignment]
    measured: dict[str, Any] = {
        "method": method,
        "learning_rate": row.number("learning_rate"),
        "steps": row.count("steps"),
        "train_s": row.number("train_s"),
        "step_s": row.number("step_s_median"),
        "peak_memory_bytes": row.count("peak_memory_bytes"),
        "trainable_parameters": row.count("trainable_parameters"),
        "total_parameters": row.count("total_parameters"),
        "stored_bytes": row.count("stored_bytes"),
        "eval_loss": row.number("final_eval_loss"),
        "best_eval_loss": row.number("best_eval_loss"),
        "samples": tuple(_sample(sample) for sample in row.items("samples")) or run.samples,
    }
    known = {name: value for name, value in measured.items() if value is not None}
    return replace(run, label=METHOD_NAMES[method], **known)


def _member(run: RunRecord, row: Values) -> MemberRecord:
    tried = []
    for one in row.items("rates_tried"):
        rate = one.number("learning_rate")
        if rate is not None:
            tried.append(RateTried(rate, one.number("eval_loss")))
    task = row.section("task_metric")
    return MemberRecord(
        run=run.name,
        rate_chosen=row.text("rate_chosen") or "",
        rates_tried=tuple(sorted(tried, key=lambda one: one.learning_rate)),
        forgetting=_change(row.section("forgetting"), "text"),
        task=_change(task, "name"),
    )


def _change(values: Values, name: str) -> Change | None:
    before, after = values.number("before"), values.number("after")
    if before is None or after is None:
        return None
    return Change(values.text(name) or "", before, after)


def _sample(row: Values) -> Sample:
    return Sample(
        step=None,
        prompt=row.text("prompt") or "",
        answer=row.text("answer") or "",
        expected=row.text("expected"),
    )
