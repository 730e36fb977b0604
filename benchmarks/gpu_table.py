"""A table and a plot of the results of `gpu_step.py`.

    python benchmarks/gpu_table.py                       # the table, in Markdown
    python benchmarks/gpu_table.py --picture docs/pictures/gpu_step.svg

Reads benchmarks/results/gpu_step_h200.jsonl; missing rows come from gpu_step_h200_before.jsonl, an
earlier run of the same program, and are marked with a star.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

CASES = ("135M-4x512", "1B-1x512", "1B-4x2048")
RESULTS = Path(__file__).parent / "results"
NAMES = {
    "ours_lora": "LoRA, ours",
    "ours_lora_packed": "LoRA, ours, packed documents",
    "ours_full": "full fine-tuning, ours",
    "ours_lora_plain": "LoRA, our plain step",
    "theirs_lora_compiled": "LoRA, transformers' model, our captured step, compiled",
    "theirs_lora_captured": "the same, not compiled",
    "theirs_lora_plain": "LoRA, transformers' model, our plain step",
    "theirs_lora_compiled_packed": "LoRA, transformers' model, compiled, packed examples",
    "theirs_lora_captured_packed": "the same, not compiled",
    "ours_lora_captured": "LoRA, our decoder, captured step",
    "full_transformers": "full fine-tuning, transformers",
    "full_transformers_compiled": "the same, compiled",
    "peft": "LoRA, PEFT",
    "peft_liger": "LoRA, PEFT + Liger",
}


DRAWN = {
    "ours_lora": "LoRA, ours",
    "theirs_lora_compiled": "LoRA, transformers' model,\nour captured step",
    "ours_full": "full, ours",
    "full_transformers": "full, transformers",
    "full_transformers_compiled": "the same, compiled",
    "peft": "LoRA, PEFT",
    "peft_liger": "LoRA, PEFT + Liger",
}


def read_rows() -> dict[tuple[str, str], dict[str, Any]]:
    """Return the measured rows by case and variant; `star` marks those of the earlier run."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, star in (("gpu_step_h200_before.jsonl", True), ("gpu_step_h200.jsonl", False)):
        for line in (RESULTS / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "step_ms" in row:
                rows[row["case"], row["variant"]] = {**row, "star": star}
    return rows


def make_table(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Return a Markdown table: ms per step / GB, and how many times faster ours is."""
    lines = ["| | " + " | ".join(CASES) + " |", "|---|" + "---|" * len(CASES)]
    for variant, name in NAMES.items():
        cells = [_cell(rows, case, variant) for case in CASES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(rows: dict[tuple[str, str], dict[str, Any]], case: str, variant: str) -> str:
    row, ours = rows.get((case, variant)), rows[case, "ours_lora"]
    if row is None:
        return "not run"
    text = f"{row['step_ms']:.1f} ms / {row['peak_gb']:.1f} GB"
    if not variant.startswith("ours_lora"):
        text += f", {row['step_ms'] / ours['step_ms']:.1f}x"
    return text + ("*" if row["star"] else "")


def draw(rows: dict[tuple[str, str], dict[str, Any]], path: Path) -> None:
    """Plot the times per step into `path`."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(9.5, 3.0))
    for case, axis in zip(CASES, axes, strict=True):
        measured = [v for v in reversed(DRAWN) if (case, v) in rows]
        times = [rows[case, v]["step_ms"] for v in measured]
        colors = [
            "#c44e00" if "captured" in DRAWN[v] or v == "ours_lora" else "#8a9bb0" for v in measured
        ]
        bars = axis.barh([DRAWN[v] for v in measured], times, color=colors)
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        axis.set_title(f"{case.replace('-', ', ').replace('x', '×')} tokens", fontsize=9)
        axis.set_xlabel("ms per step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
        if axis is not axes[0] and len(measured) == len(DRAWN):
            axis.set_yticklabels([])
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    """Print the table; write the plot if a path is given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    rows = read_rows()
    print(make_table(rows))
    if arguments.picture:
        draw(rows, arguments.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
