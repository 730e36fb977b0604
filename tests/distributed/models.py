"""Tiny decoders and data that every process of a test builds alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lora.adapters.apply import apply_lora
from lora.config import LoRAConfig, TrainConfig
from lora.data.sequences.batches import BatchStream, TokenSequences, build_sequences
from lora.data.sequences.documents import IGNORE, Documents
from lora.decoder.decoder import Decoder
from lora.device import DeviceChoice
from lora.distributed.world import World
from tests.tiny_llama import VOCABULARY, llama_config, random_decoder


def tiny_decoder(dtype: torch.dtype = torch.float64, *, tied: bool = True) -> Decoder:
    """Return a random Llama of two blocks, the same each time, with nothing trained yet."""
    return random_decoder(llama_config(tied=tied), dtype)


def with_lora(model: Decoder, **settings: Any) -> Decoder:
    """Changes `model` in place: LoRA on all linears, with B drawn too."""
    apply_lora(model, LoRAConfig(rank=4, init_seed=3, **settings))
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                parameter.add_(0.1 * noise)
    return model


def random_sequences(n_documents: int = 37, *, packing: bool) -> TokenSequences:
    """Return documents of 3 to 20 random tokens, some of them prompts without a target."""
    draw = np.random.default_rng(5)
    lengths = draw.integers(3, 21, n_documents)
    ids = draw.integers(0, VOCABULARY, lengths.sum())
    starts = np.concatenate([[0], np.cumsum(lengths)])
    labels = np.roll(ids, -1)
    labels[starts[1:] - 1] = IGNORE
    for start, length in zip(starts, lengths, strict=False):
        labels[start : start + int(draw.integers(0, length - 1))] = IGNORE
    documents = Documents(ids, labels, starts, np.arange(n_documents))
    return build_sequences(documents, 24, packing=packing, pad_id=0, seed=6)


@dataclass
class Steps:
    """What some optimizer steps came to."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    n_tokens: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Of steps that were not taken: why, and the sequences (micro-batch, index)."""
    bad: list[Any] = field(default_factory=list)
    trained: dict[str, NDArray[Any]] = field(default_factory=dict)
    """NumPy's: torch sends tensors between processes as files that end with the sender."""
    eval_loss: float = 0.0


def train_config(batch_size: int, passes: int = 1, **settings: Any) -> TrainConfig:
    """Return settings of an optimizer that moves and clips."""
    return TrainConfig(
        steps=100,
        batch_size=batch_size,
        gradient_accumulation=passes,
        learning_rate=1e-3,
        weight_decay=0.1,
        **settings,
    )


def take_steps(
    runner: Any, sequences: TokenSequences, config: TrainConfig, n_steps: int, world: World
) -> Steps:
    """Return what `n_steps` of `runner` come to, on this process's share of the batches."""
    stream = BatchStream(sequences, config.micro_batch_size, 7, share=world.share)
    done = Steps()
    for step in range(1, n_steps + 1):
        batches = [next(stream) for _ in range(config.gradient_accumulation)]
        runner.launch(step, batches, [config.peak_learning_rate])
        for outcome in runner.finished(wait=True):
            done.losses += outcome.losses
            done.norms += outcome.gradient_norms
            done.n_tokens.append(outcome.n_tokens)
            done.notes += outcome.not_finite.values()
            done.bad.append(outcome.bad_sequences)
    return done


def trained_copies(model: torch.nn.Module) -> dict[str, NDArray[Any]]:
    """Return copies of what trains, by name."""
    named = model.named_parameters()
    return {name: p.detach().clone().numpy() for name, p in named if p.requires_grad}


def cpu_choice(dtype: torch.dtype) -> DeviceChoice:
    """Return the CPU at this compute dtype; fp64 is for tests only."""
    return DeviceChoice(torch.device("cpu"), dtype, "a test")


def worst_difference(one: Steps, other: Steps) -> float:
    """Return the largest difference of losses, norms and parameters, relative to the largest."""

    pairs: list[tuple[Any, Any]] = [(one.losses, other.losses), (one.norms, other.norms)]
    assert one.trained.keys() == other.trained.keys()
    pairs += [(one.trained[name], other.trained[name]) for name in one.trained]
    found = [np.abs(np.subtract(a, b)).max() / max(np.abs(b).max(), 1e-300) for a, b in pairs]
    return float(max(found))
