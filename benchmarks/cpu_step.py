"""One training step on a CPU: LoRA and full fine-tuning, plain, ours and PEFT's.

    python benchmarks/cpu_step.py                         # S, M and SmolLM2, ten minutes
    python benchmarks/cpu_step.py --cases S --json
    python benchmarks/cpu_step.py --ranks 4 32            # ours alone: the cost of the rank
    python benchmarks/cpu_step.py --out benchmarks/results/cpu_step.jsonl

Each variant runs in its own process, so that none reuses memory that another has freed; they
alternate (median over all steps, the first not counted). `plain_full` is what a user would write,
torch's AdamW and the plain model (transformers' for SmolLM2); `best_full` is full fine-tuning
through our trainer's step; `plain_lora` wraps linears in the plain LoRALinear; `ours` is the step
that `lora finetune` chooses. Needs transformers and peft.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from lora.adapters.apply import apply_lora, replace_module
from lora.config import LoRAConfig, TrainConfig
from lora.data.sequences.batches import Batch
from lora.device import choose_device, peak_memory_bytes
from lora.lora_module import LoRALinear
from lora.pretrained.hf_weights import load_decoder
from lora.pretrained.sources import find_model
from lora.training.heap import retain_freed_memory
from lora.training.losses import loss_for
from lora.training.optim import build_optimizer
from lora.training.plain_step import train_step
from lora.training.step_runner import StepRunner
from models.bigram_lm_v2 import BigramLanguageModel, bigram_loss
from models.bigram_lm_v2_lora import EMBEDDINGS, char_lora_config
from models.char_step import CharStepRunner, char_steps

VARIANTS = ("plain_full", "best_full", "plain_lora", "peft", "ours")
Step = Callable[[], None]
Variant = tuple[str, int]
"""A variant and a rank."""
CPU = choose_device("cpu", "fp32")


@dataclass(frozen=True)
class Case:
    """A model and a batch."""

    width: int
    layers: int
    rows: int
    tokens: int
    rank: int
    rounds: int
    turn_steps: int = 1
    """Steps that a variant takes before the next variant runs."""

    @property
    def is_char(self) -> bool:
        return self.width > 0


CASES = {
    "S": Case(64, 2, 16, 32, 8, 30, 20),
    "M": Case(256, 6, 16, 128, 8, 12),
    "SmolLM2-rank8": Case(0, 0, 4, 128, 8, 5),
    "SmolLM2-rank16": Case(0, 0, 4, 128, 16, 5),
}
RANKED_CASES = ("S", "M", "SmolLM2-rank8")
"""The cases that `--ranks` measures."""


def char_batch(case: Case) -> tuple[Tensor, Tensor]:
    """Return inputs and targets (B, T) of random characters."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 96, (case.rows, case.tokens + 1), generator=draw)
    return ids[:, :-1], ids[:, 1:]


def token_batch(case: Case) -> Batch:
    """Return sequences of random tokens without padding, every token a target."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49152, (case.rows, case.tokens), generator=draw)
    positions = torch.arange(case.tokens).expand(case.rows, -1)
    return Batch(ids, ids.roll(-1, dims=1), positions, torch.zeros_like(ids))


def char_step(case: Case, variant: str) -> Step:
    """Return a function that takes one step of the character GPT."""
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
    steps = char_steps(model, CPU, TrainConfig())
    assert isinstance(steps, CharStepRunner)
    return lambda: take(steps, batch)


def smollm2_step(case: Case, variant: str) -> Step:
    """Return a function that takes one step of SmolLM2-135M."""
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
    if not settings:  # a real model's head is not adapted
        linears.remove("lm_head")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linears, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel(model, config)


def make_plain(model: nn.Module) -> None:
    """Changes `model` in place: plain LoRALinears instead of the layers that apply_lora chose."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            plain = LoRALinear(layer.unwrap(), layer.rank, layer.alpha, scaling=layer.scaling)
            replace_module(model, name, plain)


def plain_step(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """Return a training step as a tutorial writes it."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step


def our_step(model: nn.Module, batch: Any, loss_fn: Any) -> Step:
    """Return a step of lora's trainer."""
    model.train()
    optimizer = build_optimizer(model, 1e-4, 0.0)
    return lambda: void(train_step(model, [batch], loss_fn, optimizer))


def take(steps: StepRunner, batch: Any) -> None:
    """Take a step as the trainer's loop does."""
    steps.launch(1, [batch], [1e-4])
    steps.finished(wait=True)


def void(value: object) -> None:
    """Forget `value`."""


def build(case: Case, variant: str) -> Step:
    """Return a function that takes one step of `case` in this variant."""
    return char_step(case, variant) if case.is_char else smollm2_step(case, variant)


class Worker:
    """A subprocess that takes steps of one variant on request."""

    def __init__(self, name: str, variant: str, rank: int) -> None:
        command = [sys.executable, __file__, "--serve", name, variant, str(rank)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ask(1)  # builds the model and takes a first step, which does not count

    def ask(self, n_steps: int) -> Any:
        """Return the seconds of `n_steps` steps; for 0 the peak megabytes, and end the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(n_steps, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"a worker ended with exit code {self.process.wait()}")
        return json.loads(answer)


def serve(name: str, variant: str, rank: int) -> None:
    """Run as a worker: take steps on request."""
    step = build(replace(CASES[name], rank=rank), variant)
    with ExitStack() as entered:
        if variant not in ("plain_full", "peft"):  # the others are runs of our trainer
            entered.enter_context(retain_freed_memory())
        answer(step)


def answer(step: Step) -> None:
    """Answer each number on standard input with one line of JSON."""
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            began_s = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began_s)
        print(json.dumps(seconds or peak_memory_bytes(torch.device("cpu")) / 1e6), flush=True)
        if not seconds:
            return


def measure(name: str, case: Case, variants: list[Variant]) -> list[dict[str, Any]]:
    """Return a row for each variant and rank: medians and peaks of processes that alternate."""
    workers = [Worker(name, variant, rank) for variant, rank in variants]
    seconds: list[list[float]] = [[] for _ in workers]
    for _ in range(case.rounds):
        for worker, times in zip(workers, seconds, strict=True):
            times += worker.ask(case.turn_steps)
    medians_ms = [1000 * statistics.median(times) for times in seconds]
    ours = [ms for (variant, _), ms in zip(variants, medians_ms, strict=True) if variant == "ours"]
    ours_ms = ours[0] if ours else math.nan  # of several ranks the first
    rows = []
    for (variant, rank), step_ms, worker in zip(variants, medians_ms, workers, strict=True):
        row: dict[str, Any] = {"case": name, "variant": variant, "rank": rank}
        row |= {"step_ms": round(step_ms, 2), "peak_mb": round(worker.ask(0))}
        row["tokens_per_s"] = round(1000 * case.rows * case.tokens / step_ms)
        row["against_ours"] = round(step_ms / ours_ms, 2)
        rows.append({**row, "threads": torch.get_num_threads(), "torch": torch.__version__})
    return rows


def main() -> int:
    """Measure the cases, print a table or JSON lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--ranks", nargs="+", type=int, help="ours alone, at these ranks")
    parser.add_argument("--rounds", type=int, help="instead of the case's own number of rounds")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--out", type=Path, help="also append the JSON lines to this file")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        name, variant, rank = arguments.serve
        serve(name, variant, int(rank))
        return 0
    for name in arguments.cases or (RANKED_CASES if arguments.ranks else CASES):
        case = replace(CASES[name], rounds=arguments.rounds or CASES[name].rounds)
        variants = [(variant, case.rank) for variant in arguments.variants]
        if arguments.ranks:
            variants = [("ours", rank) for rank in arguments.ranks]
        rows = measure(name, case, variants)
        show(rows, arguments.json)
        if arguments.out:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    return 0


def show(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print rows as JSON lines or as a table."""
    if as_json:
        for row in rows:
            print(json.dumps(row), flush=True)
        return
    print(f"{rows[0]['case']}: {rows[0]['threads']} threads, torch {rows[0]['torch']}")
    for row in rows:
        peak = f"{row['peak_mb']:6d} MB"
        ratio = f"{row['against_ours']:.2f}x of ours"
        label = f"{row['variant']}, rank {row['rank']}"
        print(f"  {label:<20}{row['step_ms']:9.1f} ms {peak}  {ratio}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
