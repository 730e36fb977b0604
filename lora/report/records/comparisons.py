"""A comparison's run directory as report records: its members, and LoRA's ratios to the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora.report.records.command import comparison_command
from lora.report.records.reading import relative
from lora.report.records.records import (
    Change,
    ComparisonSummary,
    MemberSummary,
    RunSummary,
    SweepSummary,
    method_name,
)
from lora.report.records.runs import read_run
from lora.runs.comparison_record import (
    COMPARE_FILE,
    MEMBERS,
    Comparison,
    Member,
    RateTrial,
    Ratios,
    ratios,
    read_comparison,
)
from lora.runs.read_record import read_run_record
from lora.runs.record import RUN_FILE, RunRecord
from lora.runs.typed_json import Faults


def read_comparison_directory(
    folder: Path, base: Path, name: str, faults: Faults
) -> tuple[ComparisonSummary, list[RunSummary]]:
    """Return the comparison in `folder` and its members' runs; `base` is the report's directory.

    One that is not finished has no compare.json yet: its members are read as they stand.
    """
    run_record = read_run_record(folder, faults)
    comparison = read_comparison(folder, faults)
    if comparison is None:
        inside = sorted(path.parent for path in (folder / MEMBERS).glob(f"*/{RUN_FILE}"))
        runs = [read_run(own, base, faults, group=name) for own in inside]
        record = ComparisonSummary(
            name=name,
            folder=relative(folder, base),
            status="unfinished",
            base=run_record.model,
            same=_same(run_record),
            command=comparison_command(run_record, folder.name),
        )
        return record, [replace(run, label=method_name(run.method)) for run in runs]
    runs, members = [], []
    for member in _members_with_runs(folder, comparison, faults):
        run = _member_run(read_run(folder / member.folder, base, faults, group=name), member)
        runs.append(run)
        members.append(_member_record(run, member))
    record = ComparisonSummary(
        name=name,
        folder=relative(folder, base),
        status="finished",
        base=comparison.base,
        same=comparison.same,
        base_eval_loss=_finite(comparison.base_eval_loss),
        rate_steps=comparison.rate_steps,
        members=tuple(members),
        base_samples=comparison.base_samples,
        notes=comparison.notes,
        command=comparison_command(run_record, folder.name),
    )
    return record, runs


def find_ratios(
    runs: Sequence[RunSummary], sweeps: Sequence[SweepSummary] = ()
) -> tuple[Ratios, ...]:
    """Return the ratios of each LoRA run to the runs it can be compared with.

    In a comparison these are all other members; in a sweep its best candidate is compared with full
    fine-tuning. A single LoRA run is compared with the one single run of full fine-tuning; if there
    are several of those, it is not known which one is meant.
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
        found += [ratios(one.figures, other.figures) for one in ours for other in others]
    return tuple(found)


def _same(run_record: RunRecord) -> str | None:
    same = (run_record.compare or {}).get("same")
    return same if isinstance(same, str) else None


def _members_with_runs(folder: Path, comparison: Comparison, faults: Faults) -> list[Member]:
    found = []
    for number, member in enumerate(comparison.members, start=1):
        if (folder / member.folder / RUN_FILE).is_file():
            found.append(member)
        else:
            where = f"{folder / COMPARE_FILE}: members, number {number}"
            faults.append(f"{where}: the member's directory {member.folder!r} holds no run.")
    return found


def _member_run(run: RunSummary, member: Member) -> RunSummary:
    """Return a member's run with the figures that the comparison measured."""
    measured: dict[str, Any] = {
        "learning_rate": member.learning_rate,
        "steps": member.steps,
        "train_s": member.train_s,
        "step_s": member.step_s_median,
        "peak_memory_bytes": member.peak_memory_bytes,
        "trainable_parameters": member.trainable_parameters,
        "total_parameters": member.total_parameters,
        "stored_bytes": member.stored_bytes,
        "eval_loss": member.final_eval_loss,
        "best_eval_loss": member.best_eval_loss,
        "saved_eval_loss": member.saved_eval_loss,
    }
    known = {n: v for n, v in measured.items() if v is not None and math.isfinite(v)}
    return replace(
        run,
        label=method_name(member.method),
        method=member.method,
        samples=member.samples or run.samples,
        **known,
    )


def _member_record(run: RunSummary, member: Member) -> MemberSummary:
    trials = (RateTrial(t.learning_rate, _finite(t.eval_loss)) for t in member.rates_tried)
    text, score = member.forgetting, member.task_metric
    return MemberSummary(
        run=run.name,
        rate_chosen=member.rate_chosen,
        rates_tried=tuple(sorted(trials, key=lambda trial: trial.learning_rate)),
        forgetting=None if text is None else Change(text.text, text.before, text.after),
        task=None if score is None else Change(score.name, score.before, score.after),
    )


def _finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None
