"""How far a candidate of a sweep drifts from the same run alone, against the effect of rounding.

    python benchmarks/sweep_drift.py                # the character GPT on a CPU, a minute
    python benchmarks/sweep_drift.py --out benchmarks/results/sweep_drift_cpu.jsonl

Each setting trains three times on the same data in fp32: alone, alone with the initial A perturbed
by 1e-7 of its size (an fp32 rounding), and stacked with three others. A JSON line each gives the
relative distance of the second and the third from the first over all tensors, by step; and that of
the third in fp64, where the order of sums hardly matters.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from lora.adapters.apply import apply_lora, lora_layers
from lora.config import LoRAConfig, TrainConfig
from lora.data.sequences.blocks import BlockStream
from lora.device import choose_device
from lora.stacked.apply import apply_stacked
from lora.stacked.plain_step import PlainStackedRunner
from lora.training.optim import build_optimizer, schedule_factor, set_learning_rate
from lora.training.plain_step import train_step
from models.bigram_lm_v2 import BigramLanguageModel

STEPS, MARKS, ROWS, TOKENS = 200, (1, 10, 50, 100, 200), 8, 32
MOVED = 1e-7
SETTINGS = ((1, 16.0, 2e-2), (1, 16.0, 2e-3), (8, 16.0, 2e-2), (8, 16.0, 2e-3))
"""Rank, alpha and learning rate of the candidates that train together."""
Values = dict[int, list[Tensor]]


def adapter(number: int) -> LoRAConfig:
    """Return the adapter of setting `number`."""
    rank, alpha, _ = SETTINGS[number]
    return LoRAConfig(rank=rank, alpha=alpha, init_seed=number)


def build(dtype: torch.dtype) -> BigramLanguageModel:
    """Return the base: the same each time."""
    torch.manual_seed(0)
    return BigramLanguageModel(96, 64, 4, 2, TOKENS).to(dtype)


def batches(number: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Return the data of setting `number`: text with something to learn, each character by two."""
    draw = torch.Generator().manual_seed(1)
    text = torch.randint(0, 48, (4000,), generator=draw).repeat_interleave(2)
    return BlockStream(text, TOKENS, ROWS, number, torch.device("cpu"))


def loss_sums(model: Any, batch: tuple[Tensor, Tensor], n: int = 1) -> tuple[Tensor, Tensor]:
    """Return each of `n` adapters' summed loss in nats and target tokens, (K,), (K,)."""
    logits, targets = model(batch[0])[0], batch[1]  # (K·B, T, V), (K·B, T)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)  # (K·B·T, V)
    losses = torch.nn.functional.cross_entropy(wide, targets.flatten(), reduction="none")
    return losses.view(n, -1).sum(1), torch.full((n,), targets.numel() // n)


def train_alone(number: int, dtype: torch.dtype, moved: float = 0.0) -> Values:
    """Return A and B after the steps in MARKS, trained as `lora finetune` trains."""
    model: Any = apply_lora(build(dtype), adapter(number))
    layers, config, stream = lora_layers(model), TrainConfig(steps=STEPS), batches(number)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in layers.values():
            noise = torch.randn(layer.lora_A.shape, generator=draw).to(dtype)
            layer.lora_A.mul_(1 + moved * noise)
    rate = SETTINGS[number][2]
    optimizer = build_optimizer(model, rate, config.weight_decay, config.whole_rate_fraction)
    found: Values = {}
    for step in range(STEPS):
        set_learning_rate(optimizer, rate * schedule_factor(step, config))
        limit = config.max_grad_norm
        train_step(model, [next(stream)], loss_sums, optimizer, max_grad_norm=limit)
        if step + 1 in MARKS:
            parts = [p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)]
            found[step + 1] = [p.detach().clone() for p in parts]
    return found


def train_together(dtype: torch.dtype) -> list[Values]:
    """Return the same for every setting, all trained in one stack."""
    n = len(SETTINGS)
    model = build(dtype)
    stacked = apply_stacked(model, [adapter(k) for k in range(n)], range(n))
    stacked.stack.batch_size = ROWS
    training = PlainStackedRunner(
        model,
        stacked,
        lambda own, batch: loss_sums(own, batch, n),
        [TrainConfig(steps=STEPS)] * n,
        choose_device("cpu", "fp32"),
    )
    streams = [batches(k) for k in range(n)]
    found: list[Values] = [{} for _ in range(n)]
    for step in range(STEPS):
        inputs, targets = zip(*(next(stream) for stream in streams), strict=True)
        factor = schedule_factor(step, TrainConfig(steps=STEPS))
        rates = [rate * factor for _, _, rate in SETTINGS]
        training.launch(step + 1, [(torch.cat(inputs), torch.cat(targets))], rates)
        if step + 1 in MARKS:
            for k in range(n):
                values = stacked.values(k)
                names = [f"{m}.{part}" for m in stacked.layers for part in ("lora_A", "lora_B")]
                found[k][step + 1] = [values[name].clone() for name in names]
    return found


def distances(ones: Values, others: Values) -> dict[int, float]:
    """Return the relative distance over all tensors, by step."""
    found = {}
    for step, tensors in ones.items():
        apart = sum(
            (a - b).double().square().sum() for a, b in zip(tensors, others[step], strict=True)
        )
        size = sum(a.double().square().sum() for a in tensors)
        found[step] = float(f"{float((apart / size) ** 0.5):.2g}")
    return found


def main() -> int:
    """Print a line of JSON for each setting."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the lines to this file")
    arguments = parser.parse_args()
    together, exact = train_together(torch.float32), train_together(torch.float64)
    lines = []
    for number, (rank, alpha, rate) in enumerate(SETTINGS):
        alone = train_alone(number, torch.float32)
        row = {
            "rank": rank,
            "alpha": alpha,
            "rate": rate,
            "moved_by_rounding": distances(alone, train_alone(number, torch.float32, MOVED)),
            "together": distances(alone, together[number]),
            "together_fp64": distances(train_alone(number, torch.float64), exact[number]),
            "hardware": "two CPU cores",
            "torch": torch.__version__,
        }
        lines.append(json.dumps(row))
        print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
