"""One training step of SmolLM2-135M: LoRA and full fine-tuning, ours against the peers.

    python benchmarks/smollm2_step.py                 # 4×128 tokens, rank 8, about five minutes
    python benchmarks/smollm2_step.py --rounds 1      # a short look

The variants alternate in one process, so that a change of the machine's speed affects all of them.
The first round is not counted. Prints JSON lines; needs transformers and peft.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.adapters.apply import apply_lora
from lora.config import LoRAConfig
from lora.data.sequences.batches import IGNORE, Batch
from lora.pretrained.hf_weights import load_decoder
from lora.pretrained.sources import find_model
from lora.training.losses import loss_for
from lora.training.optim import build_optimizer
from lora.training.plain_step import train_step


def full_logits_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the summed loss of a whole batch without padding from all logits, and its tokens."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)  # (N, V)
    labels = batch.labels.flatten()
    loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")
    return loss[None], (labels != IGNORE).sum()[None]


Variant = tuple[nn.Module, Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]]


def build_variants(folder: Path, rank: int) -> dict[str, Variant]:
    """Return the compared models and their loss functions, by name."""
    import peft
    import transformers

    def theirs() -> Any:
        return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)

    full = load_decoder(folder).requires_grad_(True)
    lora = apply_lora(load_decoder(folder), LoRAConfig(rank=rank))
    settings = peft.LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(theirs(), settings)
    return {
        "full, transformers": (theirs(), full_logits_loss),
        "full, ours": (full, loss_for(full)),
        "LoRA, PEFT": (adapted, full_logits_loss),
        "LoRA, ours": (lora, loss_for(lora)),
    }


def random_batch(rows: int, tokens: int) -> Batch:
    """Return sequences of random tokens without padding, every token a target."""
    ids = torch.randint(0, 49152, (rows, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, dims=1)
    positions = torch.arange(tokens).expand(rows, -1)
    return Batch(ids, labels, positions, torch.zeros_like(ids))


def main() -> None:
    """Time the variants, alternating, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    variants = build_variants(find_model().folder, arguments.rank)
    optimizers = {name: build_optimizer(model, 1e-4, 0.0) for name, (model, _) in variants.items()}
    batch = random_batch(arguments.rows, arguments.tokens)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(arguments.rounds + 1):
        for name, (model, loss_fn) in variants.items():
            began_s = time.perf_counter()
            train_step(model, [batch], loss_fn, optimizers[name])
            seconds[name].append(time.perf_counter() - began_s)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    for name, median_s in medians.items():
        row = {"case": f"SmolLM2-135M {arguments.rows}x{arguments.tokens} rank {arguments.rank}"}
        row |= {
            "variant": name,
            "step_ms": round(1000 * median_s),
            "threads": torch.get_num_threads(),
        }
        row["against LoRA, ours"] = round(median_s / medians["LoRA, ours"], 2)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
