"""The results of `gpu_many.py` as tables in a page, between two marks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from devices.cases import NEMO_70B_TOKENS_PER_S, SWEEP

START, END = "<!-- gpu_many:start -->", "<!-- gpu_many:end -->"
NAMES = {
    "ours": "LoRA, bf16 base",
    "ours_fp8": "LoRA, fp8 base",
    "ours_full": "full fine-tuning",
    "peft_liger": "PEFT + Liger",
    "peft_liger_recompute": "PEFT + Liger, blocks recomputed",
    "transformers_full": "full, transformers",
    "transformers_full_recompute": "full, transformers, blocks recomputed",
}
Row = dict[str, Any]


def read_rows(files: Iterable[Path]) -> list[Row]:
    """Return the measured rows; of one case on one machine the last one counts."""
    found: dict[tuple[str, str], Row] = {}
    for path in files:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "step_ms" in row and "blocks" not in row and "top" not in row:
                found[row["hardware"], row["case"]] = row
    return list(found.values())


def scaling_table(rows: list[Row]) -> list[str]:
    """Return the lines of the table of what is the same on one device and on several."""
    lines = [
        "| on each GPU | | GPUs | one | all together | ratio | GB, each |",
        "|---|---|---|---|---|---|---|",
    ]
    rates = {(row["hardware"], row["case"]): row["tokens_per_s"] for row in rows}
    for row in rows:
        alone = f"{row['shape']}:{row['variant']}:none:1"
        one = rates.get((row["hardware"], alone))
        if row["parallel"] == "ddp" and "ratio" in row and one is not None:
            lines.append(
                f"| {_shape(row)} | {NAMES.get(row['variant'], row['variant'])} | "
                f"{_hardware(row)} | {one:,} tokens/s | {row['tokens_per_s']:,} tokens/s | "
                f"{row['ratio']:.2f}x | {row['peak_gb']:.1f} |"
            )
    return lines


def sharded_table(rows: list[Row]) -> list[str]:
    """Return the lines of the table of sharded models."""
    lines = [
        "| on each GPU | | GPUs | ms per step | tokens/s, each | GB, each | to the peer |",
        "|---|---|---|---|---|---|---|",
    ]
    sharded = [row for row in rows if row["parallel"] == "fsdp"]
    for row in sharded:
        rate = f"{row['tokens_per_s_device']:,}"
        if row["shape"] == "70B-1x4096":
            rate += f" ({row['tokens_per_s_device'] / NEMO_70B_TOKENS_PER_S:.2f}x NeMo's)"
        planned = f", {row['planned_gb']:.1f} planned" if "planned_gb" in row else ""
        lines.append(
            f"| {_shape(row)} | {NAMES.get(row['variant'], row['variant'])} | {_hardware(row)} | "
            f"{row['step_ms']:,.0f} | {rate} | {row['peak_gb']:.1f}{planned} | "
            f"{_to_peer(row, sharded)} |"
        )
    return lines


def _to_peer(row: Row, rows: list[Row]) -> str:
    """Return how many times as fast as the fastest peer that trains the same, on this hardware."""
    if not row["variant"].startswith("ours"):
        return ""
    peer = "transformers_full" if row["variant"] == "ours_full" else "peft"
    same = [r for r in rows if all(r[k] == row[k] for k in ("shape", "devices", "hardware"))]
    rates = [r["tokens_per_s"] for r in same if r["variant"].startswith(peer)]
    return f"{row['tokens_per_s'] / max(rates):.2f}x" if rates else ""


def make_tables(rows: list[Row]) -> str:
    """Return both tables in Markdown."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    rows = sorted(rows, key=lambda row: (shapes.index(row["shape"]), row["devices"]))
    return "\n".join([*scaling_table(rows), "", *sharded_table(rows)])


def write_tables(page: Path, files: Iterable[Path]) -> None:
    """Change `page`: the tables of `files` between its two marks."""
    text = put_between(page.read_text(encoding="utf-8"), START, END, make_tables(read_rows(files)))
    page.write_text(text, encoding="utf-8")


def put_between(page: str, start: str, end: str, made: str) -> str:
    """Return the page with `made` in place of what is between its two marks."""
    before, mark, rest = page.partition(start)
    _, last, after = rest.partition(end)
    if not (mark and last):
        raise SystemExit(f"Cannot write the tables: the page has no {start} … {end}.")
    return f"{before}{start}\n{made}\n{end}{after}"


def _hardware(row: Row) -> str:
    return row["hardware"].replace("NVIDIA ", "").replace(" 80GB HBM3", "")


def _shape(row: Row) -> str:
    if row["shape"] == SWEEP:
        return "135M, sweep of eight candidates, 4×512 tokens each"
    return row["shape"].replace("-", ", ").replace("x", "×")
