"""The results of `gpu_families.py` as tables in a page, between two marks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from devices.table import put_between

from families.cases import FAMILIES, SWEEP, llama_of

START, END = "<!-- gpu_families:start -->", "<!-- gpu_families:end -->"
NAMES = {
    "ours": "LoRA, ours",
    "ours_packed": "LoRA, ours, packed documents",
    "ours_full": "full fine-tuning, ours",
    "full_transformers": "full fine-tuning, transformers",
    "full_transformers_compiled": "the same, compiled",
    "peft": "LoRA, PEFT",
    "peft_liger": "LoRA, PEFT + Liger",
}
LONG_TOKENS = 4096
"""Of a step: from here on the wanted ratios are those of large batches."""
Row = dict[str, Any]
Rows = Mapping[tuple[str, str], Row]


def read_rows(files: Iterable[Path]) -> list[Rows]:
    """Return the rows of each machine by shape and variant; of a cell the last one counts."""
    found: dict[str, dict[tuple[str, str], Row]] = {}
    for path in files:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "step_ms" in row or "skipped" in row:
                found.setdefault(row["hardware"], {})[row["shape"], row["variant"]] = row
    return list(found.values())


def steps_table(rows: Rows) -> list[str]:
    """Return the lines of the table of steps: ms, GB, and the time relative to our LoRA's."""
    shapes = [shape for shape in FAMILIES if (shape, "ours") in rows]
    lines = ["| | " + " | ".join(map(_sizes, shapes)) + " |", "|---|" + "---|" * len(shapes)]
    for variant, name in NAMES.items():
        cells = [_cell(rows, shape, variant) for shape in shapes]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _cell(rows: Rows, shape: str, variant: str) -> str:
    row = rows.get((shape, variant))
    if row is None:
        return "not run"
    if "skipped" in row:
        return "does not fit" if "memory" in row["skipped"] or "fit" in row["skipped"] else "–"
    text = f"{row['step_ms']:.1f} ms / {row['peak_gb']:.1f} GB"
    ours = rows[shape, "ours"].get("step_ms")
    if ours is None or variant in ("ours", "ours_packed"):
        return text
    return f"{text}, {row['step_ms'] / ours:.1f}x"


def wanted_table(rows: Rows) -> list[str]:
    """Return the lines of the table of ratios beside those that were wanted."""
    lines = [
        "| | to full fine-tuning | to PEFT | to PEFT + Liger | time per FLOP, Llama = 1 | step |",
        "|---|---|---|---|---|---|",
    ]
    for shape, sizes in FAMILIES.items():
        ours = rows.get((shape, "ours"), {})
        if "step_ms" not in ours:
            continue
        is_long = sizes.rows * sizes.tokens >= LONG_TOKENS
        ratios = [
            _ratio(rows, shape, "full_transformers", None if is_long else 8),
            _ratio(rows, shape, "peft", None if is_long else 15),
            _ratio(rows, shape, "peft_liger", 1.25 if is_long else None),
            _per_flop(ours, rows.get((llama_of(shape), "ours"), {})),
        ]
        step = ours.get("step", "").partition(":")[0]
        lines.append(f"| {_sizes(shape)} | {' | '.join(ratios)} | {step} |")
    return lines


def _ratio(rows: Rows, shape: str, variant: str, wanted: float | None) -> str:
    theirs, ours = rows.get((shape, variant), {}), rows[shape, "ours"]
    if "step_ms" not in theirs:
        return "does not fit" if "skipped" in theirs else "not run"
    text = f"{theirs['step_ms'] / ours['step_ms']:.2f}x"
    return text if wanted is None else f"{text} (wanted {wanted:g})"


def _per_flop(ours: Row, llama: Row) -> str:
    if "step_ms" not in llama:
        return "not run"
    return f"{llama['tflops'] / ours['tflops']:.2f} (wanted at most 1.15)"


def other_lines(rows: Rows) -> list[str]:
    """Return a sentence on the sweep and one on transformers' Llama, where they were measured."""
    lines = []
    for (shape, variant), row in rows.items():
        if variant.startswith("sweep") and "step_ms" in row:
            together, one = row["step_ms"], row["one_ms"]
            text = f"A step of {SWEEP} candidates of {_sizes(shape)} each takes {together:.1f} ms"
            text += f", that of one {one:.1f}: {SWEEP * one / together:.2f} times as fast as"
            lines += ["", f"{text} {SWEEP} in turn ({row['peak_gb']:.1f} GB)."]
        if variant.startswith("theirs") and "step_ms" in row:
            how = "blocks compiled" if variant.endswith("compiled") else "blocks as they are"
            text = f"transformers' {_sizes(shape)}, our captured step, {how}"
            lines += ["", f"{text}: {row['step_ms']:.1f} ms, {row['peak_gb']:.1f} GB."]
    return lines


def make_tables(machines: list[Rows]) -> str:
    """Return the tables of all machines in Markdown."""
    lines: list[str] = []
    for rows in machines:
        about = next(iter(rows.values()))
        hardware = about["hardware"].replace("NVIDIA ", "")
        packages = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        lines += ["", f"{hardware[0].upper()}{hardware[1:]}; {packages}:", ""]
        lines += [*steps_table(rows), "", *wanted_table(rows), *other_lines(rows)]
    return "\n".join(lines[1:])


def write_tables(page: Path, files: Iterable[Path]) -> None:
    """Change `page`: the tables of `files` between its two marks."""
    made = make_tables(read_rows(files))
    text = put_between(page.read_text(encoding="utf-8"), START, END, made)
    page.write_text(text, encoding="utf-8")


def _sizes(shape: str) -> str:
    name, _, batch = shape.rpartition("-")
    return f"{name}, {batch.replace('x', '×')}"
