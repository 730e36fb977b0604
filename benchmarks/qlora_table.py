"""What `gpu_step.py` measured over nf4, beside QLoRA elsewhere, as tables in docs/performance.md.

    python benchmarks/qlora_table.py                # the tables
    python benchmarks/qlora_table.py --write        # and into the page

Reads benchmarks/results/gpu_nf4_*.jsonl, a file for each run; of one cell the last line counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Rows = dict[tuple[str, str], Row]
RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
START, END = "<!-- qlora_table:start -->", "<!-- qlora_table:end -->"
FILES = {
    "gpu_nf4_h200.jsonl": "",
    "gpu_nf4_first_h200.jsonl": ", an earlier run, with a slower kernel that unpacks nf4",
    "gpu_nf4_h100.jsonl": "",
}
"""What is shown, and what is to be said of it."""
CASES = ("1B-4x2048", "8B-1x2048", "8B-4x2048", "70B-1x2048", "70B-1x4096")
NAMES = {
    "ours_lora": "LoRA, bf16 base",
    "ours_lora_full": "the same, `--memory full`",
    "ours_lora_fp8": "fp8 base",
    "ours_lora_fp8_full": "the same, `--memory full`",
    "ours_lora_int8": "int8 base",
    "ours_lora_nf4": "**nf4 base**",
    "ours_lora_nf4_packed": "the same, packed documents",
    "ours_lora_nf4_full": "nf4 base, `--memory full`",
    "ours_lora_nf4_offload": "nf4 base, `--memory full+offload`",
    "ours_lora_nf4_embeddings_full": "nf4 base, `--memory full --nf4-embeddings`",
    "ours_lora_nf4_embeddings_offload": "nf4 base, `--memory full+offload --nf4-embeddings`",
    "peft_bnb": "PEFT + bitsandbytes",
    "peft_bnb_recompute": "the same, recomputing",
    "peft_bnb_liger": "PEFT + bitsandbytes + Liger, all bf16",
    "peft_bnb_liger_recompute": "the same, recomputing",
    "unsloth_nf4": "Unsloth",
}
MAX_GB = {"8B-1x2048": 8, "70B-1x2048": 48, "70B-1x4096": 48}
"""Wanted: the most memory that a step over nf4 takes."""
MIN_RATIO, MAX_TO_BF16 = 1.5, 1.15
"""Wanted: how many times faster than PEFT + bitsandbytes, and of our own step over bf16."""


def read_rows(path: Path) -> Rows:
    """Return the rows of a file by case and variant."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    return {(row["case"], row["variant"]): row for row in rows}


def steps_table(rows: Rows) -> list[str]:
    """Return the lines of the table of all cells: ms per step and GB."""
    cases = [case for case in CASES if any(case == own for own, _ in rows)]
    lines = ["| | " + " | ".join(map(_shape, cases)) + " |", "|---|" + "---|" * len(cases)]
    for variant, name in NAMES.items():
        cells = [_cell(rows.get((case, variant))) for case in cases]
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if "step_ms" not in row:
        why = row.get("skipped") or row.get("failed", "")
        return "out of memory" if "out of memory" in why.lower() else "–"
    digits = 1 if row["step_ms"] < 1000 else 0
    mark = "?" if row.get("doubts") else ""
    return f"{row['step_ms']:,.{digits}f} ms / {row['peak_gb']:.1f} GB{mark}"


def goals_table(rows: Rows) -> list[str]:
    """Return the lines of the table of what was wanted and what was measured."""
    lines = ["| | wanted | measured |", "|---|---|---|"]
    for case in CASES:
        ours = _measured(rows, case, "ours_lora_nf4")
        lines += _memory_goal(case, ours)
        lines += _peer_goals(rows, case, ours)
        lines += _bf16_goal(rows, case)
    return lines


def _memory_goal(case: str, ours: Sequence[Row]) -> list[str]:
    if case not in MAX_GB or not ours:
        return []
    least = sorted(ours, key=lambda row: row["peak_gb"])[:2]
    cells = [f"{row['peak_gb']:.2f} GB in {row['step_ms']:,.0f} ms ({_name(row)})" for row in least]
    return [f"| {_shape(case)}: memory | at most {MAX_GB[case]} GB | {'; '.join(cells)} |"]


def _peer_goals(rows: Rows, case: str, ours: Sequence[Row]) -> list[str]:
    """Return for each peer the ratio to the same kind of step here, and to one in its memory."""
    lines = []
    for peer in _measured(rows, case, "peft_bnb"):
        same = "ours_lora_nf4_full" if "recompute" in peer["variant"] else "ours_lora_nf4"
        shown = [row for row in ours if row["variant"] == same] or list(ours[:1])
        within = [row for row in ours if row["peak_gb"] <= peer["peak_gb"]]
        if within and shown and shown[0] not in within:
            shown.append(min(within, key=lambda row: row["step_ms"]))
        cells = [
            f"{peer['step_ms'] / row['step_ms']:.2f}x in {row['peak_gb'] / peer['peak_gb']:.2f} of "
            f"its memory ({_name(row)})"
            for row in shown
        ]
        name = _peer_name(peer["variant"])
        lines.append(f"| {_shape(case)}: {name} | at least {MIN_RATIO}x | {'; '.join(cells)} |")
    return lines


def _name(row: Row) -> str:
    words = NAMES.get(row["variant"], row["variant"]).strip("*")
    return words.removeprefix("nf4 base, ") if words != "nf4 base" else "nothing recomputed"


def _peer_name(variant: str) -> str:
    liger = " + Liger" if "liger" in variant else ""
    return f"PEFT + bitsandbytes{liger}" + (", recomputing" if "recompute" in variant else "")


def _bf16_goal(rows: Rows, case: str) -> list[str]:
    nf4, bf16 = (rows.get((case, name), {}) for name in ("ours_lora_nf4", "ours_lora"))
    if "step_ms" not in nf4 or "step_ms" not in bf16:
        return []
    ratio = f"{nf4['step_ms'] / bf16['step_ms']:.2f}x"
    wanted = f"at most {MAX_TO_BF16}x" if case.endswith("4x2048") else ""
    return [f"| {_shape(case)}: nf4's step to bf16's | {wanted} | {ratio} |"]


def _measured(rows: Rows, case: str, prefix: str) -> list[Row]:
    return [
        row
        for (own, variant), row in rows.items()
        if own == case and variant.startswith(prefix) and "step_ms" in row
    ]


def _shape(case: str) -> str:
    return case.replace("-", ", ").replace("x", "×")


def make_page(files: Sequence[Path]) -> str:
    """Return the tables of all cards."""
    parts = []
    for path in files:
        rows = read_rows(path)
        measured = [row for row in rows.values() if "step_ms" in row]
        if not measured:
            continue
        about = measured[0]
        found = {name: v for row in measured for name, v in row["versions"].items()}
        versions = ", ".join(f"{name} {version}" for name, version in found.items())
        head = about["hardware"].replace("NVIDIA ", "").replace(" 80GB HBM3", "")
        head = f"O{head[1:]}{FILES.get(path.name, '')}"
        parts += [f"{head}; {versions}:", "\n".join(steps_table(rows))]
        if not FILES.get(path.name):
            parts += ["\n".join(goals_table(rows))]
    return "\n\n".join(parts)


def main() -> int:
    """Print the tables and write them where that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    arguments = parser.parse_args()
    known = [RESULTS / name for name in FILES if (RESULTS / name).exists()]
    made = make_page(arguments.files or known)
    print(made)
    if arguments.write:
        from devices.table import put_between

        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(put_between(page, START, END, made), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
