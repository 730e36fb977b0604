"""Settings of a run, as frozen dataclasses that check themselves when they are made.

The only place where defaults stand. Flags, YAML keys and documentation are made from the fields
and from the text under each. No torch here, so that `lora --help` stays quick.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from lora.errors import ConfigError, did_you_mean, gather

Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["auto", "fp32", "bf16"]
MemoryMode = Literal["auto", "none", "cheap", "full", "full+offload"]
BaseDtype = Literal["auto", "fp8"]
LearnOn = Literal["assistant", "all"]
LongExamples = Literal["truncate", "split", "drop"]

FULL_LEARNING_RATE = 1e-4
"""Default learning rate of full fine-tuning; LoRA's is ten times it."""
LORA_LEARNING_RATE = 10 * FULL_LEARNING_RATE


MAX_EVALUATIONS, MIN_EVAL_STEPS = 10, 10
"""Unless `eval_every_steps` is given: evaluations after the start, and steps between them."""
LARGEST_SEED = 2**63 - 1


def _check(condition: bool, name: str, seen: object, allowed: str) -> list[str]:
    return [] if condition else [f"{name}={seen!r}: allowed is {allowed}"]


def _check_counts(owner: object, least: int, *names: str) -> list[str]:
    values = {name: getattr(owner, name) for name in names}
    allowed = f"an int ≥ {least}"
    return [
        fault
        for name, value in values.items()
        for fault in _check(_is_int(value) and value >= least, name, value, allowed)
    ]


def _check_seed(name: str, seed: object) -> list[str]:
    in_range = _is_int(seed) and 0 <= seed <= LARGEST_SEED  # type: ignore[operator]
    return _check(in_range, name, seed, "an int from 0 to 2**63 - 1")


def _check_choice(name: str, seen: object, choices: object) -> list[str]:
    words: tuple[str, ...] = get_args(choices)
    near = did_you_mean(str(seen), words)
    return _check(seen in words, name, seen, f"one of {', '.join(words)}.{near}")


def _pairs_of(name: str, value: object, faults: list[str]) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    faults += _check(False, name, value, "numbers by name ending")
    return []


def _raise_if(faults: list[str], owner: object) -> None:
    if faults:
        kind = type(owner).__name__
        raise ConfigError(gather(faults, f"{kind} has settings out of range:", "Change them."))


@dataclass(frozen=True)
class LoRAConfig:
    """What LoRA adds to a model (arXiv 2106.09685), in PEFT's terms where PEFT has one."""

    rank: int = 8
    """Rows of A and columns of B, R; at most the smaller side of each adapted linear."""
    alpha: float = 16.0
    """Numerator of the scaling: alpha / rank (alpha / sqrt(rank) with rslora)."""
    dropout: float = 0.0
    """Share of LoRA's inputs set to zero during training, 0 ≤ dropout < 1."""
    targets: str | tuple[str, ...] = "all-linear"
    """Which linears to adapt: "all-linear" (all but the output head), name endings such as
    q_proj, full names, or one regular expression that must match the whole name."""
    exclude: tuple[str, ...] = ()
    """Name endings or full names that are left alone although `targets` takes them in."""
    modules_to_save: tuple[str, ...] = ()
    """Name endings of modules that train whole and are saved with the adapter (embeddings)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (arXiv 2312.03732)."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Rank by name ending, for linears whose rank is not `rank`."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alpha by name ending, for linears whose alpha is not `alpha`."""
    layers: tuple[int, ...] | None = None
    """Numbers of the blocks to adapt; None adapts all."""
    init_seed: int | None = None
    """Seed of A's first values; None draws from torch's global generator."""

    def __post_init__(self) -> None:
        for name in ("targets", "exclude", "modules_to_save", "layers"):
            if isinstance(getattr(self, name), list):  # as PEFT's users write them
                object.__setattr__(self, name, tuple(getattr(self, name)))
        faults = _check(_is_int(self.rank) and self.rank >= 1, "rank", self.rank, "an int ≥ 1")
        faults += _check(_is_positive(self.alpha), "alpha", self.alpha, "a finite number > 0")
        in_range = _is_number(self.dropout) and 0 <= self.dropout < 1
        faults += _check(in_range, "dropout", self.dropout, "0 ≤ dropout < 1")
        in_range = _is_pattern(self.targets) or _is_tuple_of(str, self.targets)
        in_range = in_range and bool(self.targets)
        faults += _check(in_range, "targets", self.targets, "a pattern or at least one name")
        for name in ("exclude", "modules_to_save"):
            names = getattr(self, name)
            faults += _check(_is_tuple_of(str, names), name, names, "a tuple of names")
        in_range = self.layers is None or _is_tuple_of(int, self.layers)
        faults += _check(in_range, "layers", self.layers, "a tuple of ints")
        faults += _check(isinstance(self.rslora, bool), "rslora", self.rslora, "true or false")
        if self.init_seed is not None:
            faults += _check_seed("init_seed", self.init_seed)
        for name, rank in _pairs_of("rank_pattern", self.rank_pattern, faults):
            faults += _check(_is_int(rank) and rank >= 1, f"rank_pattern[{name!r}]", rank, "≥ 1")
        for name, alpha in _pairs_of("alpha_pattern", self.alpha_pattern, faults):
            faults += _check(_is_positive(alpha), f"alpha_pattern[{name!r}]", alpha, "> 0")
        _raise_if(faults, self)


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation: how many steps of what size, and how the rate moves."""

    steps: int = 200
    """Optimizer steps of the whole run."""
    batch_size: int = 8
    """Rows of one optimizer step, over all micro-batches."""
    micro_batches: int = 1
    """Parts that a step's rows are split into to save memory; the result is the same."""
    learning_rate: float | None = None
    """Peak rate; None takes the method's default (LoRA 1e-3, full fine-tuning 1e-4)."""
    whole_rate_fraction: float = 0.3
    """Beside LoRA, the rate of what trains whole (embeddings), as a share of LoRA's."""
    schedule: Schedule = "cosine"
    """How the rate falls after the warm-up."""
    warmup_fraction: float = 0.05
    """Share of `steps` over which the rate rises from zero."""
    min_rate_fraction: float = 0.1
    """Where cosine and linear end, as a share of the peak rate."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay; norms, biases and embeddings get none."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    seed: int = 1337
    """Seed of everything random: A's first values, dropout, order of the data, samples."""
    precision: Precision = "auto"
    """Type of the products: auto takes bf16 where the device is good at it."""

    def __post_init__(self) -> None:
        faults = _check_counts(self, 1, "steps", "batch_size", "micro_batches")
        if not faults:
            divides = self.batch_size % self.micro_batches == 0
            allowed = f"a divisor of batch_size={self.batch_size}"
            faults += _check(divides, "micro_batches", self.micro_batches, allowed)
        rate = self.learning_rate
        faults += _check(rate is None or _is_positive(rate), "learning_rate", rate, "> 0")
        for name in ("warmup_fraction", "min_rate_fraction", "whole_rate_fraction"):
            value = getattr(self, name)
            faults += _check(_is_number(value) and 0 <= value <= 1, name, value, "0 to 1")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            faults += _check(_is_number(value) and value >= 0, name, value, "≥ 0")
        faults += _check_seed("seed", self.seed)
        faults += _check_choice("schedule", self.schedule, Schedule)
        faults += _check_choice("precision", self.precision, Precision)
        _raise_if(faults, self)

    @property
    def micro_batch_size(self) -> int:
        """Sequences of one micro-batch."""
        return self.batch_size // self.micro_batches

    def resolved(self, *, full: bool) -> TrainConfig:
        """Return the same settings, with the method's default where no learning rate is given."""
        default = FULL_LEARNING_RATE if full else LORA_LEARNING_RATE
        rate = default if self.learning_rate is None else self.learning_rate
        return dataclasses.replace(self, learning_rate=rate)

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate`, once it is known. Raises ConfigError where it is still None."""
        if self.learning_rate is None:
            raise ConfigError(
                "Cannot train: learning_rate is None, and its default depends on the method. Give "
                "a number, or take TrainConfig.resolved(full=...)."
            )
        return self.learning_rate


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it becomes rows of tokens."""

    max_length: int = 512
    """Tokens of a row, T."""
    packing: bool = True
    """Put several examples into one row; none sees another."""
    learn_on: LearnOn = "assistant"
    """Learn the assistant's turns (or the completion) only, or every token."""
    long_examples: LongExamples = "truncate"
    """What becomes of examples longer than `max_length`."""
    eval_fraction: float = 0.05
    """Share of the examples split off for evaluation when no file is given for it."""
    max_eval_examples: int = 200
    """At most so many examples are split off for evaluation."""
    chat_template: Path | None = None
    """File with a jinja chat template to use instead of the model's own."""
    special_tokens: tuple[str, ...] = ()
    """Tokens to add to the vocabulary, with commas between: each becomes one token that is never
    split, and its row of the embedding and the head trains beside LoRA. Tokens that the model has
    already keep their number, and their rows train too."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "special_tokens", _split_words(self.special_tokens))
        faults = _check_counts(self, 2, "max_length")
        faults += _check_special_tokens(self.special_tokens)
        in_range = _is_number(self.eval_fraction) and 0 <= self.eval_fraction < 1
        faults += _check(in_range, "eval_fraction", self.eval_fraction, "0 ≤ fraction < 1")
        faults += _check_counts(self, 1, "max_eval_examples")
        faults += _check(isinstance(self.packing, bool), "packing", self.packing, "true or false")
        faults += _check_choice("learn_on", self.learn_on, LearnOn)
        faults += _check_choice("long_examples", self.long_examples, LongExamples)
        _raise_if(faults, self)


@dataclass(frozen=True)
class RunConfig:
    """Where a run's results go and how often it reports."""

    out: Path = Path("runs")
    """Folder that holds the runs."""
    name: str | None = None
    """Name of this run's folder; None makes one from the date and the model."""
    eval_every_steps: int = 0
    """Steps between evaluations; 0 makes at most ten in a run, at least ten steps apart. The start
    and the end are always evaluated."""
    save_every_steps: int = 0
    """Steps between checkpoints; 0 saves at each evaluation."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept; the one with the best held-out loss stays besides."""
    patience: int = 0
    """Stop after so many evaluations without a better loss; 0 never stops early."""
    samples: int = 2
    """Held-out prompts that are answered, greedily, at each evaluation; 0: none."""
    sample_tokens: int = 48
    """Most tokens of such an answer."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 …"""
    fast: bool = True
    """Take the fast step where it can train the model; false always takes the plain one."""
    skip_nonfinite: int = 0
    """Steps whose loss or gradient is not finite that are left out and counted; one more stops the
    run."""
    tensorboard: bool = False
    """Also write TensorBoard's event files into the run's folder."""

    def __post_init__(self) -> None:
        counts = ("eval_every_steps", "save_every_steps", "patience", "samples", "skip_nonfinite")
        faults = _check_counts(self, 0, *counts)
        faults += _check_counts(self, 1, "keep_checkpoints", "sample_tokens")
        for name in ("fast", "tensorboard"):
            value = getattr(self, name)
            faults += _check(isinstance(value, bool), name, value, "true or false")
        _raise_if(faults, self)

    def eval_interval(self, steps: int) -> int:
        """Return the steps between evaluations of a run of `steps` steps."""
        return self.eval_every_steps or max(MIN_EVAL_STEPS, math.ceil(steps / MAX_EVALUATIONS))

    def save_interval(self, steps: int) -> int:
        """Return the steps between checkpoints of a run of `steps` steps."""
        return self.save_every_steps or self.eval_interval(steps)


@dataclass(frozen=True)
class MemoryConfig:
    """What the fast step of a GPU keeps between forward and backward; the rest is made again."""

    memory: MemoryMode = "auto"
    """What is kept: none makes nothing again; cheap makes norms and SwiGLU again, and gate and up
    in as many blocks as it takes to fit; full keeps only each block's input; full+offload has that
    wait in host memory. auto takes the first of these that fits."""
    memory_gb: float | None = None
    """What the run may hold on the GPU, in GB (10⁹ bytes); None: nearly all that is free."""

    def __post_init__(self) -> None:
        faults = _check_choice("memory", self.memory, MemoryMode)
        gb = self.memory_gb
        faults += _check(gb is None or _is_positive(gb), "memory_gb", gb, "a finite number > 0")
        _raise_if(faults, self)


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen."""

    max_new_tokens: int = 256
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0 takes the likeliest token; 1 draws from the model's own distribution."""
    top_k: int = 0
    """Draw from so many of the likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = 0
    """Of the draws; row number n of a batch draws with seed + n."""

    def __post_init__(self) -> None:
        faults = _check_counts(self, 1, "max_new_tokens")
        faults += _check_counts(self, 0, "top_k")
        faults += _check_seed("seed", self.seed)
        in_range = _is_number(self.temperature) and self.temperature >= 0
        faults += _check(in_range, "temperature", self.temperature, "a finite number ≥ 0")
        in_range = _is_number(self.top_p) and 0 < self.top_p <= 1
        faults += _check(in_range, "top_p", self.top_p, "0 < top_p ≤ 1")
        _raise_if(faults, self)


def _split_words(value: object) -> object:
    """Return a tuple of the words in `value`, which commas part too; anything else as it is."""
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        return value
    return tuple(part.strip() for word in words for part in word.split(","))


def _check_special_tokens(tokens: object) -> list[str]:
    if not _is_tuple_of(str, tokens):
        return _check(False, "special_tokens", tokens, "a list of words")
    words = cast(tuple[str, ...], tokens)
    faults = _check("" not in words, "special_tokens", words, "words that are not empty")
    twice = sorted({word for word in words if words.count(word) > 1})
    return faults + _check(not twice, "special_tokens", words, f"each once, not {twice} twice")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_tuple_of(kind: type, value: object) -> bool:
    right = isinstance(value, tuple) and all(isinstance(item, kind) for item in value)
    return right and not any(isinstance(item, bool) for item in value)  # type: ignore[attr-defined]


def _is_pattern(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: object) -> bool:
    return _is_number(value) and value > 0  # type: ignore[operator]
