"""Builds the HTML page of a report: one self-contained file with a light and a dark theme."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from lora.report import tables
from lora.report.canvas import LINE_STYLES, SERIES
from lora.report.figures import MAX_BARS, choose_curves
from lora.report.numbers import count_text, loss_text, short, size_text, time_text
from lora.report.records.records import (
    NOT_QUANTISED,
    ComparisonSummary,
    Report,
    RunSummary,
    SweepSummary,
)
from lora.runs.comparison_record import Sample

TEMPLATE = "page.html.jinja"
STYLE = "page.css"
MAX_COLUMNS = 6
"""Runs shown side by side in a table of settings; more are shown as a list of values."""
MAX_PROMPTS, MAX_ANSWERS = 6, 8
_DASHES = ("", "7 3", "7 3 2 3", "2 3", "6 2", "2 2")
"""The pictures' line styles as SVG stroke-dasharray values."""


@dataclass(frozen=True)
class Drawing:
    """A picture rendered as SVG."""

    name: str
    caption: str
    svg: str
    """Our own markup: inserted without escaping."""


@dataclass(frozen=True)
class Answer:
    """An answer of one model."""

    who: str
    text: str
    is_expected: bool
    is_cut: bool


@dataclass(frozen=True)
class PromptAnswers:
    """A prompt and the answers to it."""

    prompt: str
    expected: str | None
    answers: tuple[Answer, ...]


def build_page(report: Report, drawn: dict[str, list[Drawing]]) -> str:
    """Return the page as HTML; `drawn` has the pictures of each section.

    Sections are loss, course, memory and `group NAME`. All text that comes from files is escaped.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page: str = environment.get_template(TEMPLATE).render(
        report=report,
        style=_read(STYLE),
        icon=base64.b64encode(_ICON.encode()).decode(),
        drawn=drawn,
        series=list(zip(SERIES, _DASHES, strict=True)),
        findings=find_findings(report),
        facts=find_facts(report),
        runs_table=tables.runs_table(report, find_keys(report)),
        ratios_table=tables.ratios_table(report),
        sweeps=[(s, tables.dropped_table(report.group(s.name))) for s in report.sweeps],
        comparisons=[(c, tables.members_table(report, c)) for c in report.comparisons],
        describe_sweep=describe_sweep,
        describe_comparison=describe_comparison,
        prompts=find_answers(report),
        memory_table=tables.memory_table(report, MAX_BARS),
        differing=tables.differing_table(report, MAX_COLUMNS),
        settings=tables.facts_table("setting", [run.settings for run in report.runs]),
        data=tables.facts_table("data", [run.data for run in report.runs]),
        machine=tables.facts_table("machine", [_machine(run) for run in report.runs]),
        commands=find_commands(report),
        warnings=list(dict.fromkeys(note for run in report.runs for note in run.notes)),
    )
    return page


def find_keys(report: Report) -> dict[str, int]:
    """Return the index of the colour and line style of each run that the pictures name."""
    return {run.name: number for number, run in enumerate(choose_curves(report.runs)[0])}


def find_findings(report: Report) -> list[str]:
    """Return the main findings, a sentence each."""
    found = [text for one in report.ratios if (text := tables.describe_ratios(report, one))]
    found += [text for sweep in report.sweeps if (text := _sweep_finding(report, sweep))]
    alone = [run for run in report.runs if not run.group]
    if len(alone) == 1 or not found:
        named = len(report.runs) > 1
        found += [f"{run.name}: {_run_finding(run)}" if named else _run_finding(run)
                  for run in alone[:3]]  # fmt: skip
    return found


def _run_finding(run: RunSummary) -> str:
    if not run.held_out:
        return "Nothing has been measured yet."
    first, last = run.held_out[0], run.held_out[-1]
    took = f" and {time_text(run.train_s)}" if run.train_s else ""
    so_far = "" if run.status == "finished" else f" It is unfinished: {_progress(run)}."
    so_far += " It stopped early." if run.stopped_early else ""
    so_far += f" Saved: step {count_text(run.saved_step)}." if run.saved_step is not None else ""
    if first is last:
        return f"Validation loss {loss_text(last.loss)} at step {last.step}.{so_far}"
    best = min(run.held_out, key=lambda point: point.loss)
    steps = f"{count_text(last.step - first.step)} steps{took}"
    if best is last:
        return (
            f"Validation loss went from {loss_text(first.loss)} to {loss_text(last.loss)} nats per "
            f"token, its best, in {steps}.{so_far}"
        )
    if best is first:
        return (
            f"Training did not help: validation loss is {loss_text(first.loss)} nats per token "
            f"before training, its best, and {loss_text(last.loss)} after {steps}. Try a lower "
            f"learning rate.{so_far}"
        )
    worse = ", worse than before training" if last.loss > first.loss else ""
    return (
        f"Best validation loss {loss_text(best.loss)} nats per token at step "
        f"{count_text(best.step)}, from {loss_text(first.loss)} before training; "
        f"{loss_text(last.loss)} at the end{worse}, after {steps}.{so_far}"
    )


def _progress(run: RunSummary) -> str:
    total = "" if run.total_steps is None else f" of {count_text(run.total_steps)}"
    return f"step {count_text(run.steps or 0)}{total}"


def _sweep_finding(report: Report, sweep: SweepSummary) -> str:
    if sweep.best is None:
        return f"{sweep.name} is unfinished: no candidate has been chosen yet."
    best = next((run for run in report.runs if run.name == sweep.best), None)
    if best is None:
        return ""
    base_loss = sweep.base_eval_loss
    base = "" if base_loss is None else f", from {loss_text(base_loss)} without an adapter"
    said = (
        f"The best of {sweep.candidates} candidates is rank {count_text(best.rank)} at learning "
        f"rate {short(best.learning_rate)}: validation loss {loss_text(best.result_loss)}{base}."
    )
    spot = sweep.sweet_spot
    if spot is not None and spot.rank != spot.best_rank:
        said += f" Rank {spot.rank} is enough: {loss_text(spot.loss)} is within noise of the best."
    elif spot is not None:
        said += " No smaller rank is within noise of it."
    if spot is not None and all(tried.n_seeds == 1 for tried in sweep.tried):
        said += " With one seed the difference may be chance: try --seed 0,1,2."
    return said


def describe_sweep(sweep: SweepSummary) -> str:
    """Return a sentence on how a sweep ran."""
    parts = [f"{sweep.candidates} candidates"]
    if sweep.at_once:
        parts.append(f"{sweep.at_once} trained together")
    if sweep.steps:
        parts.append(f"{count_text(sweep.steps)} steps each")
    if sweep.halving:
        parts.append("the worse half stopped at 25 % and 50 % of the steps")
    if sweep.train_s:
        parts.append(f"{time_text(sweep.train_s)} of training for all")
    if sweep.peak_memory_bytes:
        parts.append(f"peak memory {size_text(sweep.peak_memory_bytes)} for all")
    return ", ".join(parts) + ("." if sweep.status == "finished" else "; unfinished.")


def describe_comparison(comparison: ComparisonSummary) -> str:
    """Return how a comparison was made, in a few sentences."""
    same = {"steps": "the same number of steps", "time": "the same training time"}
    parts = [f"From the same base, {comparison.base}," if comparison.base else "From the same base"]
    parts.append("on the same data in the same order")
    if comparison.same in same:
        parts.append(f"for {same[comparison.same]}")
    text = " ".join(parts) + "."
    if comparison.base_eval_loss is not None:
        text += f" Validation loss of the base: {loss_text(comparison.base_eval_loss)}."
    text_name = next((m.forgetting.name for m in comparison.members if m.forgetting), None)
    if text_name:
        text += f" Forgetting is measured on: {text_name}."
    if comparison.rate_steps:
        text += f" Learning rates were tried for {count_text(comparison.rate_steps)} steps each."
    return text if comparison.status == "finished" else f"{text} It is unfinished."


def find_facts(report: Report) -> list[tuple[str, str]]:
    """Return model, device and data of the runs."""
    runs = report.runs
    facts = [
        ("model", tables.distinct(run.model for run in runs)),
        ("base", tables.distinct(_bases(runs))),
        ("device", tables.distinct(run.device for run in runs)),
        ("data", tables.distinct(run.data.get("source") for run in runs)),
        ("examples", _examples(runs)),
    ]
    return [(name, value) for name, value in facts if value != tables.DASH]


def _bases(runs: Sequence[RunSummary]) -> list[str]:
    """Return how LoRA's bases were stored; nothing where none was quantised."""
    bases = [run.stored_base for run in runs if run.method != "full"]
    return bases if set(bases) - {NOT_QUANTISED} else []


def _examples(runs: Sequence[RunSummary]) -> str:
    seen = []
    for run in runs:
        learned, held_out = run.data.get("examples"), run.data.get("held_out_examples")
        if isinstance(learned, int) and isinstance(held_out, int):
            seen.append(f"{count_text(learned)} training, {count_text(held_out)} validation")
    return tables.distinct(seen)


def find_answers(report: Report) -> list[PromptAnswers]:
    """Return prompts with the answers of the runs side by side, before training first."""
    by_prompt: dict[str, list[tuple[str, Sample]]] = {}
    for comparison in report.comparisons:
        for sample in comparison.base_samples:
            by_prompt.setdefault(sample.prompt, []).append(("before", sample))
    for run in report.runs:
        own = [sample for sample in run.samples if sample.step is not None]
        ends = {sample.prompt: sample for sample in own}  # the newest of each prompt
        for sample in own:
            said = by_prompt.setdefault(sample.prompt, [])
            if sample.step == 0 and sample is not ends[sample.prompt] and not said:
                said.append(("before", sample))
        for sample in (*ends.values(), *(s for s in run.samples if s.step is None)):
            who = run.label if len(report.runs) > 1 else f"step {sample.step}"
            by_prompt.setdefault(sample.prompt, []).append((who, sample))
    return [
        PromptAnswers(
            prompt=prompt,
            expected=next((s.expected for _, s in said if s.expected is not None), None),
            answers=tuple(
                Answer(who, sample.answer, _is_expected(sample), sample.is_cut)
                for who, sample in said[:MAX_ANSWERS]
            ),
        )
        for prompt, said in list(by_prompt.items())[:MAX_PROMPTS]
    ]


def _is_expected(sample: Sample) -> bool:
    return sample.expected is not None and sample.answer.strip() == sample.expected.strip()


def find_commands(report: Report) -> list[tuple[str, str]]:
    """Return the commands that repeat each run, sweep and comparison, by name."""
    jobs: list[Any] = [*report.comparisons, *report.sweeps]
    jobs += [run for run in report.runs if not run.group]
    return [(job.name, job.command) for job in jobs if job.command]


def _machine(run: RunSummary) -> dict[str, Any]:
    return {
        "device": run.device,
        **{key.removeprefix("versions."): value for key, value in run.environment.items()},
        "base fingerprint": run.base_fingerprint,
        "training data fingerprint": run.data.get("fingerprint"),
        "validation data fingerprint": run.data.get("held_out_fingerprint"),
    }


def _read(name: str) -> str:
    return (resources.files("lora.report") / name).read_text(encoding="utf-8")


_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><path d="M2 3c3 0 3 9 12 9" '
    'fill="none" stroke="#0072b2" stroke-width="2.4" stroke-linecap="round"/></svg>'
)

__all__ = ["LINE_STYLES", "Drawing", "build_page"]
