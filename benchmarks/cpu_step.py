"""One training step on a CPU: LoRA and full fine-tuning, plain, ours and PEFT's.

    python benchmarks/cpu_step.py                         # S, M and SmolLM2, ten minutes
    python benchmarks/cpu_step.py --cases S --json
    python benchmarks/cpu_step.py --out benchmarks/results/cpu_step.jsonl

Variants take turns in one process for the time (median of the rounds, the first not counted) and
run alone in a process of their own for the peak memory. `plain_full` is what a user would run:
torch's AdamW and the model as it is (transformers' for SmolLM2); `best_full` is full fine-tuning
through our trainer's step; `plain_lora` wraps linears by the plain LoRALinear; `ours` is what
apply_lora chooses. Needs transformers and peft.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from lora.apply import apply_lora, replace_module
from lora.config import LoRAConfig
from lora.data.batches import Batch
from lora.decoder.hf_weights import load_decoder
from lora.decoder.sources import find_model
from lora.device import peak_memory_bytes
from lora.lora_module import LoRALinear
from lora.losses import loss_for
from lora.optim import build_optimizer
from lora.trainer import train_step
from models.bigram_lm_v2 import BigramLanguageModel, bigram_loss
from models.bigram_lm_v2_lora import EMBEDDINGS, char_lora_config

VARIANTS = ("plain_full", "best_full", "plain_lora", "peft", "ours")
Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """A model and a batch."""

    width: int
    layers: int
    rows: int
    tokens: int
    rank: int
    rounds: int

    @property
    def is_char(self) -> bool:
        return self.width > 0


CASES = {
    "S": Case(64, 2, 16, 32, 8, 300),
    "M": Case(256, 6, 16, 128, 8, 12),
    "S-rank4": Case(64, 2, 16, 32, 4, 300),
    "S-rank32": Case(64, 2, 16, 32, 32, 300),
    "M-rank4": Case(256, 6, 16, 128, 4, 12),
    "M-rank32": Case(256, 6, 16, 128, 32, 12),
    "SmolLM2-rank8": Case(0, 0, 4, 128, 8, 5),
    "SmolLM2-rank16": Case(0, 0, 4, 128, 16, 5),
}
DEFAULT_CASES = ("S", "M", "SmolLM2-rank8", "SmolLM2-rank16")


def char_batch(case: Case) -> tuple[Tensor, Tensor]:
    """Return inputs and targets (B, T) of random characters."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 96, (case.rows, case.tokens + 1), generator=draw)
    return ids[:, :-1], ids[:, 1:]


def token_batch(case: Case) -> Batch:
    """Return rows of random tokens without padding, everything learned."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49152, (case.rows, case.tokens), generator=draw)
    positions = torch.arange(case.tokens).expand(case.rows, -1)
    return Batch(ids, ids.roll(-1, dims=1), positions, torch.zeros_like(ids))


def char_step(case: Case, variant: str) -> Step:
    """Return what takes one step of the character GPT."""
    torch.manual_seed(0)
    model: Any = BigramLanguageModel(96, case.width, 4, case.layers, case.tokens)
    batch = char_batch(case)
    settings = char_lora_config(case.rank, 2.0 * case.rank, 0.0, True)
    if variant == "plain_full":
        return plain_step(model, lambda: model(*batch)[1])
    if variant == "peft":
        adapted = add_peft(model, case.rank, modules_to_save=list(EMBEDDINGS))
        return plain_step(adapted, lambda: adapted(*batch)[1])
    if variant != "best_full":
        apply_lora(model, settings)
    if variant == "plain_lora":
        make_plain(model)
    return our_step(model, batch, bigram_loss)


def smollm2_step(case: Case, variant: str) -> Step:
    """Return what takes one step of SmolLM2-135M."""
    folder, batch = find_model().folder, token_batch(case)
    if variant in ("plain_full", "peft"):
        import transformers

        model: Any = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if variant == "peft":
            model = add_peft(model, case.rank)
        ids = batch.input_ids
        return plain_step(model.train(), lambda: model(input_ids=ids, labels=ids).loss)
    decoder = load_decoder(folder)
    if variant == "best_full":
        decoder.requires_grad_(True)
    else:
        apply_lora(decoder, LoRAConfig(rank=case.rank, alpha=2.0 * case.rank))
    if variant == "plain_lora":
        make_plain(decoder)
    return our_step(decoder, batch, loss_for(decoder))


def add_peft(model: Any, rank: int, **settings: Any) -> Any:
    """Return `model` with PEFT's LoRA on all linears."""
    import peft

    linears = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    if not settings:  # a real model's head stays as it is
        linears.remove("lm_head")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linears, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel(model, config)


def make_plain(model: nn.Module) -> None:
    """Changes `model` in place: the reference layer instead of what apply_lora chose."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            plain = LoRALinear(layer.unwrap(), layer.rank, layer.alpha, scaling=layer.scaling)
            replace_module(model, name, plain)


def plain_step(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """Return a step as a tutorial writes it."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step


def our_step(model: nn.Module, batch: Any, loss_fn: Any) -> Step:
    """Return a step of the product's trainer."""
    model.train()
    optimizer = build_optimizer(model, 1e-4, 0.0)
    return lambda: void(train_step(model, [batch], loss_fn, optimizer))


def void(value: object) -> None:
    """Forget `value`."""


def build(case: Case, variant: str) -> Step:
    """Return what takes one step of `case` in this variant."""
    return char_step(case, variant) if case.is_char else smollm2_step(case, variant)


def measure_times(case: Case, variants: list[str]) -> dict[str, float]:
    """Return the median milliseconds of each variant, taking turns."""
    steps = {variant: build(case, variant) for variant in variants}
    gc.collect()
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(case.rounds + 1):
        for variant, step in steps.items():
            began_s = time.perf_counter()
            step()
            seconds[variant].append(time.perf_counter() - began_s)
    return {v: 1000 * statistics.median(times[1:]) for v, times in seconds.items()}


def measure_peak_mb(name: str, variant: str) -> float:
    """Return the peak resident megabytes (10⁶ bytes) of a process that takes three steps."""
    command = [sys.executable, __file__, "--peak-of", name, variant]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> int:
    """Measure the cases, print a table or JSON lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(DEFAULT_CASES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, help="instead of the case's own number")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--no-memory", action="store_true", help="measure the time alone")
    parser.add_argument("--out", type=Path, help="also append the JSON lines to this file")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        step = build(CASES[arguments.peak_of[0]], arguments.peak_of[1])
        for _ in range(3):
            step()
        print(peak_memory_bytes(torch.device("cpu")) / 1e6)
        return 0
    for name in arguments.cases:
        case = CASES[name]
        if arguments.rounds:
            case = Case(**{**vars(case), "rounds": arguments.rounds})
        rows = measure_case(name, case, arguments.variants, memory=not arguments.no_memory)
        show(rows, arguments.json)
        if arguments.out:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    return 0


def measure_case(
    name: str, case: Case, variants: list[str], *, memory: bool
) -> list[dict[str, Any]]:
    """Return one row a variant."""
    times = measure_times(case, variants)
    rows = []
    for variant, step_ms in times.items():
        row: dict[str, Any] = {"case": name, "variant": variant, "step_ms": round(step_ms, 2)}
        row["peak_mb"] = round(measure_peak_mb(name, variant)) if memory else None
        row["tokens_per_s"] = round(1000 * case.rows * case.tokens / step_ms)
        row["against_ours"] = round(step_ms / times.get("ours", step_ms), 2)
        rows.append({**row, "threads": torch.get_num_threads(), "torch": torch.__version__})
    return rows


def show(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print rows as JSON lines or as a table."""
    if as_json:
        for row in rows:
            print(json.dumps(row), flush=True)
        return
    print(f"{rows[0]['case']}: {rows[0]['threads']} threads, torch {rows[0]['torch']}")
    for row in rows:
        peak = "" if row["peak_mb"] is None else f"{row['peak_mb']:6d} MB"
        ratio = f"{row['against_ours']:.2f}x of ours"
        print(f"  {row['variant']:<11}{row['step_ms']:9.1f} ms {peak}  {ratio}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
