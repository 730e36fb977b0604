"""What fits where: models on one to eight GPUs of 24 to 141 GB, as `lora plan` plans them.

    python benchmarks/fit_table.py                       # plans all, prints the tables
    python benchmarks/fit_table.py --write               # and writes them into docs/scale.md
    python benchmarks/fit_table.py --out benchmarks/results/fit_table.jsonl --write
    python benchmarks/fit_table.py --peaks --write       # plans beside what gpu_many.py measured

One packed sequence of 4,096 tokens on each GPU, `--memory auto`, `--parallel auto`; LoRA of rank 16
on all linears over a base in bf16, fp8 or nf4, and full fine-tuning. No GPU is needed, no weights:
the shapes are those of the config.json of meta-llama/Llama-3.1-8B, Qwen/Qwen2.5-32B and
meta-llama/Llama-3.1-70B. `planned_gb` is of one GPU, in GB (10⁹ bytes).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from devices.plans import measured_rows, peaks_table, plan_again
from devices.table import put_between

from lora.config import BaseWeights, LoRAConfig, MemoryConfig
from lora.decoder.families import decoder_config
from lora.fast.memory.parallel import (
    DOES_NOT_FIT,
    STORED,
    ParallelPlan,
    choose_parallel,
    plan_within,
)
from lora.fast.memory.plan import PlanInputs
from lora.fast.memory.planner import MemoryPlanner

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256,
    "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 5e5, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336,
                     "num_hidden_layers": 32, "num_attention_heads": 32},
    "Qwen2.5-32B": {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"],
                    "vocab_size": 152064, "rope_theta": 1e6, "hidden_size": 5120,
                    "intermediate_size": 27648, "num_hidden_layers": 64,
                    "num_attention_heads": 40},
    "Llama-3.1-70B": {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672,
                      "num_hidden_layers": 80, "num_attention_heads": 64},
}  # fmt: skip
METHODS: dict[str, BaseWeights | None] = {
    "LoRA, bf16": BaseWeights(),
    "LoRA, fp8": BaseWeights("fp8"),
    "LoRA, nf4": BaseWeights("nf4"),
    "full": None,
}
"""How the base of LoRA is stored; None: full fine-tuning."""
FREE_BYTES = {24: round(25.2e9), 48: round(50.4e9), 80: round(84.4e9), 141: round(149.6e9)}
"""Of a GPU with nothing on it, by the size in its name in GB: an H100 and an H200, measured; of the
others what is left of their memory (GiB) after the 2 % that an H100 has not free."""
DEVICES = {24: (1,), 48: (1,), 80: (1, 2, 4, 8), 141: (1, 2, 4, 8)}
"""By the size of the GPUs."""
TOKENS, RANK = 4096, 16
DOCUMENT = Path(__file__).parents[1] / "docs" / "scale.md"
FITS, PEAKS = "benchmarks/fit_table.py", "benchmarks/fit_table.py --peaks"
"""The commands that make the tables, as their markers in the document name them."""


@dataclass(frozen=True)
class Row:
    """What one model, trained one way, takes of each of so many GPUs."""

    model: str
    method: str
    gpu_gb: int
    devices: int
    fits: bool
    parallel: str | None
    step: str
    mode: str | None
    """Of activation checkpointing in the fused step."""
    recomputed_blocks: int | None
    """By FSDP2."""
    planned_gb: float
    usable_gb: float


def plan_rows(model: str, method: str) -> Iterator[Row]:
    """Yield the rows of one model and method."""
    base = METHODS[method]
    inputs = PlanInputs(
        decoder_config(MODELS[model]),
        None if base is None else LoRAConfig(rank=RANK),
        1,
        TOKENS,
        "cuda",
        torch.bfloat16,
        base=base or BaseWeights(),
    )
    ddp, sharded = MemoryPlanner(inputs), dict[int, MemoryPlanner]()
    for gpu_gb, free in FREE_BYTES.items():
        for devices in DEVICES[gpu_gb]:
            chosen = plan_within(ddp.on_devices(devices), MemoryConfig(), free)
            if devices > 1 and chosen.recomputes != STORED:
                if devices not in sharded:
                    sharded[devices] = _fsdp(inputs, devices, sharded)
                fsdp = plan_within(sharded[devices], MemoryConfig(), free)
                chosen = choose_parallel(chosen, fsdp)
            yield _row(model, method, gpu_gb, chosen)


def _fsdp(inputs: PlanInputs, devices: int, known: dict[int, MemoryPlanner]) -> MemoryPlanner:
    """Return the planner of fsdp on so many devices, with the traces of those that are known."""
    if known:
        return next(iter(known.values())).on_devices(devices)
    return MemoryPlanner(PlanInputs(**{**vars(inputs), "devices": devices, "parallel": "fsdp"}))


def _row(model: str, method: str, gpu_gb: int, chosen: ParallelPlan) -> Row:
    stored, budget_gb = chosen.plan.checkpointing, chosen.memory.memory_gb
    assert budget_gb is not None
    return Row(
        model,
        method,
        gpu_gb,
        chosen.planner.inputs.devices,
        fits=chosen.recomputes != DOES_NOT_FIT,
        parallel=chosen.parallel,
        step=chosen.plan.step,
        mode=None if stored is None else stored.mode,
        recomputed_blocks=chosen.plan.recomputed_blocks,
        planned_gb=round(chosen.plan.total / 1e9, 1),
        usable_gb=round(budget_gb, 1),
    )


def tables(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown: one table for single small GPUs, one for each larger size."""
    by_cell = {(r.model, r.method, r.gpu_gb, r.devices): r for r in rows}
    single = [(gb, 1) for gb in FREE_BYTES if DEVICES[gb] == (1,)]
    several = [[(gb, n) for n in DEVICES[gb]] for gb in FREE_BYTES if DEVICES[gb] != (1,)]
    texts = []
    for columns in (single, *several):
        heads = [f"{n} × {gpu_gb} GB" for gpu_gb, n in columns]
        lines = [f"| | | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
        for model in MODELS:
            for method in METHODS:
                cells = [_cell(by_cell[model, method, *column]) for column in columns]
                lines.append(f"| {model} | {method} | {' | '.join(cells)} |")
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def _cell(row: Row) -> str:
    if not row.fits:
        return f"– ({row.planned_gb:,.0f})"
    words = [row.parallel] if row.parallel else []
    if row.mode:
        words.append(f"`{row.mode}`")
    else:  # FSDP2 has no modes
        n_blocks = MODELS[row.model]["num_hidden_layers"]
        words.append(f"{row.recomputed_blocks}/{n_blocks} recomputed")
    return f"{', '.join(words)}: {row.planned_gb:.0f}"


def with_tables(text: str, made: str, command: str = FITS) -> str:
    """Return a page with the tables in place of those between the markers of `command`."""
    return put_between(text, f"<!-- {command}: begin -->", f"<!-- {command}: end -->", made)


def main() -> None:
    """Plan all and print, write and save what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the tables into docs/scale.md")
    parser.add_argument("--out", type=Path, help="also write the rows to this file")
    parser.add_argument("--peaks", action="store_true", help="of what gpu_many.py has measured")
    arguments = parser.parse_args()
    rows: list[Row] = []
    if arguments.peaks:
        made, command = peaks_table([plan_again(row) for row in measured_rows()]), PEAKS
    else:
        rows = [row for model in MODELS for method in METHODS for row in plan_rows(model, method)]
        made, command = tables(rows), FITS
    print(made)
    if arguments.out and rows:
        lines = [json.dumps(asdict(row)) for row in rows]
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if arguments.write:
        text = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(with_tables(text, made, command), encoding="utf-8")


if __name__ == "__main__":
    main()
