"""Adapters that train together end where each would alone; a failed one leaves the others' bits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.adapters.apply import apply_lora
from lora.config import LoRAConfig, TrainConfig
from lora.data.sequences.blocks import BlockStream
from lora.device import choose_device
from lora.stacked.apply import StackedAdapters, apply_stacked
from lora.stacked.plain_step import PlainStackedRunner
from lora.training.optim import build_optimizer, learning_rate_at, set_learning_rate
from lora.training.plain_step import train_step
from models.bigram_lm_v2 import BigramLanguageModel
from models.bigram_lm_v2_lora import EMBEDDINGS

STEPS, ROWS = 50, 4
TOKENS = torch.randint(0, 11, (400,), generator=torch.Generator().manual_seed(4))
SEEDS = (5, 6, 5, 7)
CPU = choose_device("cpu", "fp32")
ADAPTERS = [
    LoRAConfig(rank=2, alpha=4.0, modules_to_save=EMBEDDINGS, init_seed=5),
    LoRAConfig(rank=5, alpha=3.0, dropout=0.1, modules_to_save=EMBEDDINGS, init_seed=6),
    LoRAConfig(rank=1, alpha=2.0, modules_to_save=EMBEDDINGS, init_seed=5),
    LoRAConfig(rank=8, alpha=8.0, dropout=0.5, modules_to_save=EMBEDDINGS, init_seed=7),
]
TRAIN = [
    TrainConfig(steps=STEPS, learning_rate=1e-2, schedule="cosine", weight_decay=0.1),
    TrainConfig(steps=STEPS, learning_rate=3e-3, schedule="linear", max_grad_norm=0.05),
    TrainConfig(
        steps=STEPS,
        learning_rate=5e-3,
        schedule="constant",
        max_grad_norm=0.0,
        whole_rate_fraction=1.0,
    ),
    TrainConfig(steps=STEPS, learning_rate=1e-3, warmup_fraction=0.3),
]


def char_model(dtype: torch.dtype) -> BigramLanguageModel:
    torch.manual_seed(0)
    return BigramLanguageModel(11, n_embd=8, n_head=2, n_layer=2, block_size=6).to(dtype)


def stream(k: int) -> BlockStream:
    return BlockStream(TOKENS, 6, ROWS, SEEDS[k], torch.device("cpu"))


def loss_sums(model: nn.Module, batch: tuple[Tensor, Tensor], n: int) -> tuple[Tensor, Tensor]:
    logits, targets = model(batch[0])[0], batch[1]  # (K·B, T, V), (K·B, T)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(n, -1).sum(1), torch.full((n,), targets.numel() // n)


def wide_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """As bigram_loss, which rounds the logits to fp32."""
    return loss_sums(model, batch, 1)


def train_alone(k: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], float]:
    model, batches, config = apply_lora(char_model(dtype), ADAPTERS[k]), stream(k), TRAIN[k]
    optimizer = build_optimizer(model, 0.0, config.weight_decay, config.whole_rate_fraction)
    torch.manual_seed(SEEDS[k])
    for step in range(STEPS):
        set_learning_rate(optimizer, learning_rate_at(step, config))
        micro = [next(batches), next(batches)]
        done = train_step(model, micro, wide_loss, optimizer, max_grad_norm=config.max_grad_norm)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return trained, done.loss.item()


def train_together(
    dtype: torch.dtype, break_at: int = -1
) -> tuple[StackedAdapters, PlainStackedRunner, list[float]]:
    model = char_model(dtype)
    stacked = apply_stacked(model, ADAPTERS, SEEDS)
    n, calls = len(ADAPTERS), []

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        stacked.stack.batch_size = len(batch[0]) // n
        loss, count = loss_sums(model, batch, n)
        calls.append(1)
        wrong = torch.tensor([1.0, math.nan, 1.0, 1.0]) if len(calls) == break_at else 1.0
        return loss * wrong, count

    training = PlainStackedRunner(model, stacked, loss_fn, TRAIN, CPU)
    streams = [stream(k) for k in range(n)]
    for step in range(STEPS):
        micro = []
        for _ in range(2):
            inputs, targets = zip(*(next(s) for s in streams), strict=True)
            micro.append((torch.cat(inputs), torch.cat(targets)))
        rates = [learning_rate_at(step, config) for config in TRAIN]
        training.launch(step + 1, micro, rates)
        (outcome,) = training.finished(wait=False)
    return stacked, training, outcome.losses


def test_fifty_steps_of_mixed_adapters_equal_the_single_runs() -> None:
    """In fp64: values within 1e-8, relative to each tensor's norm."""
    stacked, training, losses = train_together(torch.float64)
    assert not training.failures
    for k in range(len(ADAPTERS)):
        expected, loss = train_alone(k, torch.float64)
        assert abs(losses[k] - loss) < 1e-9
        values = stacked.values(k)
        assert values.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (values[name] - tensor).norm() <= 1e-8 * tensor.norm(), (k, name)


def test_an_adapter_that_fails_leaves_the_bits_of_the_others() -> None:
    whole, _, _ = train_together(torch.float32)
    broken, training, _ = train_together(torch.float32, break_at=21)
    assert training.failures.keys() == {1}
    assert "step 11: the loss is nan" in training.failures[1]
    for k in (0, 2, 3):
        values, others = whole.values(k), broken.values(k)
        assert all(torch.equal(values[name], others[name]) for name in values)
    assert all(bool(t.isfinite().all()) for t in broken.values(1).values())
