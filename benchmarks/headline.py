"""The README's figures: ratios of our LoRA step to full fine-tuning and the peers, and a picture.

    python benchmarks/headline.py                                      # the figures, as JSON lines
    python benchmarks/headline.py --picture docs/pictures/speed.svg

Reads what `gpu_step.py` measured; every ratio is within one file, one run on one machine. NeMo
AutoModel's figure is the one that its authors publish for LoRA of Llama 3 8B on one H100 at 4,096
tokens (docs.nvidia.com/nemo/automodel, Performance Summary, seen on 2026-11-27).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
NEMO_TOKENS_PER_S = 12_473
NEMO = "NeMo AutoModel, published"


@dataclass(frozen=True)
class Panel:
    """A case, where it was measured, and the variants to show by name."""

    title: str
    file: str
    case: str
    shown: dict[str, str]
    tokens: int
    """Of a step."""


SMALL = {
    "ours_lora": "LoRA, here",
    "ours_full": "full, here",
    "full_transformers_compiled": "full, transformers, compiled",
    "full_transformers": "full, transformers",
    "peft": "LoRA, PEFT",
    "peft_liger": "LoRA, PEFT + Liger",
}
LARGE = {
    "ours_lora": "LoRA, here",
    "ours_lora_fp8": "LoRA, here, fp8 base",
    "peft_liger": "LoRA, PEFT + Liger",
}
PANELS = (
    Panel("135M, 4×512 tokens, one H200", "gpu_step_h200_again", "135M-4x512", SMALL, 2048),
    Panel("1B, 1×512 tokens, one H200", "gpu_step_h200_again", "1B-1x512", SMALL, 512),
    Panel("1B, 4×2048 tokens, one H200", "gpu_step_h200_again", "1B-4x2048", SMALL, 8192),
    Panel("8B, 1×4096 tokens, one H100", "gpu_step_8b_4096_h100", "8B-1x4096", LARGE, 4096),
)
DRAWN = (0, 1, 3)
"""Indices of the panels in the picture."""


def read_panel(panel: Panel) -> dict[str, dict[str, Any]]:
    """Return the measured rows of a panel, by the name shown."""
    lines = (RESULTS / f"{panel.file}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    found = {row["variant"]: row for row in rows if row["case"] == panel.case and "step_ms" in row}
    named = {name: found[key] for key, name in panel.shown.items() if key in found}
    if panel.case.startswith("8B-1x4096"):
        named[NEMO] = {"step_ms": 1000 * panel.tokens / NEMO_TOKENS_PER_S}
    return named


def describe(panel: Panel) -> list[dict[str, Any]]:
    """Return a row for each variant: ms per step, tokens per second, ratio to ours, memory."""
    rows = read_panel(panel)
    ours = rows["LoRA, here"]
    return [
        {
            "case": panel.title,
            "variant": name,
            "step_ms": round(row["step_ms"], 1),
            "tokens_per_s": round(1000 * panel.tokens / row["step_ms"]),
            "ratio": round(row["step_ms"] / ours["step_ms"], 2),
            "peak_gb": row.get("peak_gb"),
            "memory_saved": (
                round(1 - ours["peak_gb"] / row["peak_gb"], 2) if "peak_gb" in row else None
            ),
        }
        for name, row in rows.items()
    ]


def draw(path: Path) -> None:
    """Plot the time per step of the drawn panels into `path`."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    panels = [PANELS[number] for number in DRAWN]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(11.5, 2.7), facecolor="white")
    for panel, axis in zip(panels, axes, strict=True):
        rows = describe(panel)[::-1]
        is_ours = [row["variant"].startswith("LoRA, here") for row in rows]
        bars = axis.barh(
            [row["variant"] for row in rows],
            [row["step_ms"] for row in rows],
            color=["#c44e00" if ours else "#8a9bb0" for ours in is_ours],
        )
        labels = [f"{row['step_ms']:.3g} ms, {row['ratio']:.2g}x" for row in rows]
        labels = [text.removesuffix(", 1x") for text in labels]
        axis.bar_label(bars, labels, padding=3, fontsize=8)
        axis.set_title(panel.title, fontsize=9, loc="left")
        axis.tick_params(labelsize=8, length=0)
        axis.set_xticks([])
        axis.margins(x=0.42)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    """Print the figures; write the picture if a path is given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    for panel in PANELS:
        for row in describe(panel):
            print(json.dumps(row, ensure_ascii=False))
    if arguments.picture:
        draw(arguments.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
