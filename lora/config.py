"""Settings of a run: frozen dataclasses that check themselves when they are made.

Defaults are defined here and nowhere else. Flags, YAML keys and documentation are made from the
fields: the metadata name a flag's group in `--help`, the first paragraph under a field its line
there.
No torch here, so that `lora --help` stays quick.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora.errors import ConfigError
from lora.public.field_texts import documented
from lora.settings.base import Settings
from lora.settings.checks import MAX_COUNT as MAX_COUNT
from lora.settings.checks import MAX_NUMBER as MAX_NUMBER
from lora.settings.checks import MAX_SEED as MAX_SEED
from lora.settings.checks import NF4_BLOCKS as NF4_BLOCKS
from lora.settings.checks import (
    check,
    check_choice,
    check_counts,
    check_length,
    check_positive,
    check_reading,
    check_seed,
    check_special_tokens,
    is_int,
    is_nf4_block,
    is_number,
    is_pattern,
    is_several_names,
    is_tuple_of,
    pairs_of,
    raise_if,
    refuse_other_words,
    split_words,
    take_paths,
)
from lora.settings.former_names import with_former_names

Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["auto", "fp32", "bf16"]
MemoryMode = Literal["auto", "none", "cheap", "full", "full+offload"]
BaseDtype = Literal["auto", "fp8", "nf4", "int8", "original"]
ImplementationName = Literal["auto", "native", "transformers"]
Parallel = Literal["auto", "ddp", "fsdp"]
LearnOn = Literal["assistant", "all"]
LongExamples = Literal["truncate", "split", "drop"]
SavedWeights = Literal["best", "last"]

GROUP = "group"
"""Key of a field's metadata: the heading under which its flag stands in `--help`."""
MODEL = {GROUP: "Model"}
DATA = {GROUP: "Data"}
COMPARED = {GROUP: "What to compare"}
LORA = {GROUP: "LoRA"}
TRAINING = {GROUP: "Training"}
EVALUATION = {GROUP: "Evaluation and checkpoints"}
GENERATION = {GROUP: "Generation"}
OUTPUT = {GROUP: "Output"}
DEVICE = {GROUP: "Device and memory"}
GROUP_TITLES = tuple(
    group[GROUP]
    for group in (MODEL, DATA, COMPARED, LORA, TRAINING, EVALUATION, GENERATION, OUTPUT, DEVICE)
)
"""In the order of `--help`."""

FULL_LEARNING_RATE = 1e-4
"""Default learning rate of full fine-tuning; LoRA's is ten times as high."""
LORA_LEARNING_RATE = 10 * FULL_LEARNING_RATE


MAX_EVALUATIONS, MIN_EVAL_STEPS = 10, 10
"""Without `eval_every_steps`: evaluations after the initial one, and steps between them."""
DEFAULT_EPOCHS, DEFAULT_STEPS = 3.0, (100, 2_000)
"""Length of training where neither steps nor epochs are given: passes over the data, in at least
and at most so many steps."""
MAX_LEARNING_RATE = 1e30
"""AdamW's first update is as large as this: beyond it, fp32 has no room for its square."""
MIN_FRACTION = 1e-6
"""Least top_p and temperature (if not 0): less is lost in fp32."""


@documented
@dataclass(frozen=True)
class LoRAConfig(Settings):
    """The LoRA adapter (arXiv 2106.09685), named as in PEFT where PEFT has the setting."""

    rank: int = field(default=8, metadata=LORA)
    """LoRA rank (PEFT's r), typically 8 to 64."""
    alpha: float = field(default=16.0, metadata=LORA)
    """LoRA alpha (PEFT's lora_alpha): updates are scaled by alpha / rank."""
    dropout: float = field(default=0.0, metadata=LORA)
    """Dropout probability on LoRA's inputs (PEFT's lora_dropout)."""
    targets: str | tuple[str, ...] = field(default="all-linear", metadata=LORA)
    """Linear layers to adapt: all-linear, name suffixes (q_proj,v_proj), or one regex.

    all-linear is all but the output head. Full names are allowed too; a regular expression must
    match the whole name."""
    exclude: tuple[str, ...] = field(default=(), metadata=LORA)
    """Name suffixes or full names of layers not to adapt, among those of `targets`."""
    modules_to_save: tuple[str, ...] = field(default=(), metadata=LORA)
    """Name suffixes of modules that are fully trained and saved with the adapter, such as
    embeddings."""
    rslora: bool = field(default=False, metadata=LORA)
    """Rank-stabilized LoRA: scale by alpha / sqrt(rank) (arXiv 2312.03732)."""
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata=LORA)
    """Rank by name suffix, for layers that do not use `rank`: q_proj=4,v_proj=8."""
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata=LORA)
    """Alpha by name suffix, for layers that do not use `alpha`: q_proj=8,v_proj=16."""
    layers: tuple[int, ...] | None = field(default=None, metadata=LORA)
    """Transformer blocks to adapt, such as 0,1 (PEFT's layers_to_transform). Default: all."""
    init_seed: int | None = field(default=None, metadata=LORA)
    """Seed of A's initialization. Default: the run's seed; torch's global generator in
    apply_lora."""

    def __post_init__(self) -> None:
        for name in ("targets", "exclude", "modules_to_save", "layers"):
            if isinstance(getattr(self, name), list):  # as PEFT's users write them
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.targets, str) and is_several_names(self.targets):
            object.__setattr__(self, "targets", split_words(self.targets))
        faults = check_counts(self, 1, "rank")
        faults += check_positive("alpha", self.alpha)
        in_range = is_number(self.dropout) and 0 <= self.dropout < 1
        faults += check(in_range, "dropout", self.dropout, "≥ 0 and < 1")
        in_range = is_pattern(self.targets) or is_tuple_of(str, self.targets)
        in_range = in_range and bool(self.targets)
        faults += check(in_range, "targets", self.targets, "a regex or at least one name")
        for name in ("exclude", "modules_to_save"):
            names = getattr(self, name)
            faults += check(is_tuple_of(str, names), name, names, "a tuple of names")
        in_range = self.layers is None or is_tuple_of(int, self.layers)
        faults += check(in_range, "layers", self.layers, "a tuple of ints")
        faults += check(isinstance(self.rslora, bool), "rslora", self.rslora, "true or false")
        if self.init_seed is not None:
            faults += check_seed("init_seed", self.init_seed)
        for name, rank in pairs_of("rank_pattern", self.rank_pattern, faults):
            faults += check(is_int(rank) and rank >= 1, f"rank_pattern[{name!r}]", rank, "≥ 1")
        for name, alpha in pairs_of("alpha_pattern", self.alpha_pattern, faults):
            faults += check_positive(f"alpha_pattern[{name!r}]", alpha)
        raise_if(faults, self)


@documented
@with_former_names
@dataclass(frozen=True)
class TrainConfig(Settings):
    """Optimization: number and size of the steps, learning rate and its schedule."""

    steps: int | None = field(default=None, metadata=TRAINING)
    """Optimizer steps. Default: as many as `epochs` take."""
    epochs: float | None = field(default=None, metadata=TRAINING)
    """Passes over the training data, instead of `steps`. Default: 3, in 100 to 2,000 steps."""
    batch_size: int = field(default=8, metadata=TRAINING)
    """Effective batch size: packed sequences per optimizer step, over all micro-batches."""
    gradient_accumulation: int = field(default=1, metadata=TRAINING)
    """Gradient accumulation: split each batch into N forward and backward passes to save memory."""
    learning_rate: float | None = field(default=None, metadata=TRAINING)
    """Peak learning rate. Default: 1e-3 for LoRA, 1e-4 for full fine-tuning."""
    whole_rate_fraction: float = field(default=0.3, metadata=TRAINING)
    """Learning rate of fully trained modules (modules_to_save), as a fraction of
    `learning_rate`."""
    schedule: Schedule = field(default="cosine", metadata=TRAINING)
    """Learning rate schedule after the warm-up."""
    warmup_fraction: float = field(default=0.05, metadata=TRAINING)
    """Fraction of `steps` over which the learning rate rises linearly from zero."""
    min_rate_fraction: float = field(default=0.1, metadata=TRAINING)
    """Final learning rate of cosine and linear, as a fraction of the peak."""
    weight_decay: float = field(default=0.0, metadata=TRAINING)
    """AdamW's weight decay; not applied to norms, biases and embeddings."""
    max_grad_norm: float = field(default=1.0, metadata=TRAINING)
    """Gradient clipping norm; 0 disables clipping."""
    seed: int = field(default=1337, metadata=TRAINING)
    """Random seed of A's initialization, dropout, the validation split and the data order."""
    precision: Precision = field(default="auto", metadata=DEVICE)
    """Compute dtype; auto takes bf16 on GPUs that support it, else fp32."""

    def __post_init__(self) -> None:
        faults = check_counts(self, 1, "batch_size", "gradient_accumulation")
        if not faults:
            parts = self.gradient_accumulation
            allowed = f"a divisor of batch_size={self.batch_size}"
            divides = self.batch_size % parts == 0
            faults += check(divides, "gradient_accumulation", parts, allowed)
        faults += check_length(self.steps, self.epochs)
        rate = self.learning_rate
        if rate is not None:
            faults += check_positive("learning_rate", rate, MAX_LEARNING_RATE)
        for name in ("warmup_fraction", "min_rate_fraction", "whole_rate_fraction"):
            value = getattr(self, name)
            faults += check(is_number(value) and 0 <= value <= 1, name, value, "from 0 to 1")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            in_range = is_number(value) and 0 <= value <= MAX_NUMBER
            faults += check(in_range, name, value, f"≥ 0 and ≤ {MAX_NUMBER:g}")
        faults += check_seed("seed", self.seed)
        faults += check_choice("schedule", self.schedule, Schedule)
        faults += check_choice("precision", self.precision, Precision)
        raise_if(faults, self)

    @property
    def micro_batch_size(self) -> int:
        """Sequences of one micro-batch."""
        return self.batch_size // self.gradient_accumulation

    def resolved(self, *, full: bool) -> TrainConfig:
        """Return the same settings, with the method's default where no learning rate is given."""
        default = FULL_LEARNING_RATE if full else LORA_LEARNING_RATE
        rate = default if self.learning_rate is None else self.learning_rate
        return dataclasses.replace(self, learning_rate=rate)

    def with_steps(self, n_sequences: int, *, recorded: int | None = None) -> TrainConfig:
        """Return the same settings with a number of steps, for `n_sequences` training sequences.

        An epoch has each sequence once, packed or not. `recorded` is the number of steps of the run
        that is resumed, which stays where neither steps nor epochs are given.
        """
        steps = self.steps
        if steps is None and self.epochs is None:
            steps = recorded
        if steps is None:
            wanted = DEFAULT_EPOCHS if self.epochs is None else self.epochs
            # Less than a millionth of a step is what floats make of a whole number.
            steps = math.ceil(wanted * n_sequences / self.batch_size - 1e-6)
            least, most = (1, MAX_COUNT) if self.epochs is not None else DEFAULT_STEPS
            steps = min(max(steps, least), most)
        return dataclasses.replace(self, steps=steps, epochs=None)

    def describe_length(self, n_sequences: int) -> str:
        """Return the number of steps in words, with the epochs over `n_sequences` that they are."""
        epochs = self.n_steps * self.batch_size / n_sequences
        return f"{self.n_steps:,} steps of {self.batch_size:,} sequences, {epochs:,.4g} epochs"

    @property
    def n_steps(self) -> int:
        """`steps`, once it is known. Raises ConfigError where it is still None."""
        if self.steps is None:
            raise ConfigError(
                "Cannot train: steps is None, and its default depends on the data. Give a number, "
                "or take TrainConfig.with_steps(n_sequences)."
            )
        return self.steps

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate`, once it is known. Raises ConfigError where it is still None."""
        if self.learning_rate is None:
            raise ConfigError(
                "Cannot train: learning_rate is None, and its default depends on the method. Give "
                "a number, or take TrainConfig.resolved(full=...)."
            )
        return self.learning_rate


@documented
@dataclass(frozen=True)
class DataConfig(Settings):
    """How examples are read, tokenized, packed and split."""

    max_length: int = field(default=512, metadata=DATA)
    """Maximum sequence length, in tokens."""
    packing: bool | None = field(default=None, metadata=DATA)
    """Pack several examples into one sequence; attention stays within each. Default: where the
    model can.

    Recurrent blocks, for one, cannot keep the examples of a sequence apart."""
    learn_on: LearnOn = field(default="assistant", metadata=DATA)
    """Tokens that get a loss: assistant turns or completions (the prompt is masked), or all."""
    long_examples: LongExamples = field(default="truncate", metadata=DATA)
    """How to handle examples longer than `max_length`."""
    eval_fraction: float = field(default=0.05, metadata=DATA)
    """Fraction of the examples split off for validation if no validation data are given."""
    max_eval_examples: int = field(default=200, metadata=DATA)
    """Maximum number of examples split off for validation."""
    chat_template: Path | None = field(default=None, metadata=DATA)
    """Jinja chat template to use instead of the model's own: a file, or smollm2-tools.

    smollm2-tools is the default model's format with tools and reasoning."""
    allow_dropped_fields: bool = field(default=False, metadata=DATA)
    """Learn without tools, tool calls or reasoning that the chat template has no place for.

    What is left out is counted. Otherwise such data are refused."""
    keep_control_tokens: bool = field(default=False, metadata=DATA)
    """Read special tokens spelt out in messages as special tokens, not as ordinary text."""
    columns: dict[str, str] = field(default_factory=dict, metadata=DATA)
    """Columns with other names than those known: prompt=question,completion=answer.

    An empty name leaves a part out: context=."""
    template: str | None = field(default=None, metadata=DATA)
    """Prompt and answer made of columns: '{text}\\nLabel: {label}'; the last one is learned.

    Or what stands in [[ ]] at the end is learned."""
    raw: bool | None = field(default=None, metadata=DATA)
    """Train prompt and completion as plain text. Default: turns if there is a chat template.

    `lora generate` then prompts the adapter the same way."""
    system: str | None = field(default=None, metadata=DATA)
    """System prompt of conversations that have none; recorded, and used in generation."""
    special_tokens: tuple[str, ...] = field(default=(), metadata=DATA)
    """Special tokens to add; their embedding rows are trained (trainable_token_indices).

    Comma-separated. Rows of the embedding and of the output head are trained, also those of tokens
    that exist already."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "special_tokens", split_words(self.special_tokens))
        faults = take_paths(self, "chat_template")
        faults += check_counts(self, 2, "max_length")
        faults += check_special_tokens(self.special_tokens)
        in_range = is_number(self.eval_fraction) and 0 <= self.eval_fraction < 1
        faults += check(in_range, "eval_fraction", self.eval_fraction, "≥ 0 and < 1")
        faults += check_counts(self, 1, "max_eval_examples")
        for name in ("allow_dropped_fields", "keep_control_tokens"):
            value = getattr(self, name)
            faults += check(isinstance(value, bool), name, value, "true or false")
        is_packing = self.packing is None or isinstance(self.packing, bool)
        faults += check(is_packing, "packing", self.packing, "true or false")
        faults += check_choice("learn_on", self.learn_on, LearnOn)
        faults += check_choice("long_examples", self.long_examples, LongExamples)
        faults += check_reading(
            self.raw, self.system, self.template, self.columns, self.chat_template
        )
        raise_if(faults, self)

    @property
    def is_packed(self) -> bool:
        """Whether examples are packed: as `packing` says, and by default."""
        return self.packing is not False


@documented
@dataclass(frozen=True)
class RunConfig(Settings):
    """Run directory, evaluation, checkpoints and device."""

    out: Path = field(default=Path("runs"), metadata=OUTPUT)
    """Directory for run directories."""
    name: str | None = field(default=None, metadata=OUTPUT)
    """Name of the run directory. Default: made from the model and the date."""
    eval_every_steps: int = field(default=0, metadata=EVALUATION)
    """Steps between evaluations; 0: at most ten in a run, at least ten steps apart.

    Start and end are always evaluated."""
    save_every_steps: int = field(default=0, metadata=EVALUATION)
    """Steps between checkpoints; 0 saves at each evaluation."""
    keep_checkpoints: int = field(default=2, metadata=EVALUATION)
    """Newest checkpoints to keep; the one with the best validation loss is kept as well."""
    save: SavedWeights = field(default="best", metadata=EVALUATION)
    """Weights to save at the end: best (lowest validation loss, if there is one) or last."""
    patience: int = field(default=0, metadata=EVALUATION)
    """Early stopping: evaluations without a better validation loss before it stops; 0: never."""
    samples: int = field(default=2, metadata=EVALUATION)
    """Validation prompts answered greedily at each evaluation; 0 disables samples."""
    sample_tokens: int = field(default=48, metadata=EVALUATION)
    """Maximum number of tokens of such an answer."""
    device: str = field(default="auto", metadata=DEVICE)
    """Device: auto, cpu, cuda, cuda:1, ..."""
    parallel: Parallel = field(default="auto", metadata=DEVICE)
    """Several processes: ddp replicates the base on each device, fsdp shards it; auto is ddp if it
    fits."""
    fast: bool = field(default=True, metadata=DEVICE)
    """Use the fused GPU training step where it supports the model; false: always PyTorch
    autograd."""
    skip_nonfinite: int = field(default=0, metadata=TRAINING)
    """Steps with a NaN or infinite loss or gradient to skip before the run is aborted."""
    tensorboard: bool = field(default=False, metadata=OUTPUT)
    """Also write TensorBoard event files into the run directory."""

    def __post_init__(self) -> None:
        counts = ("eval_every_steps", "save_every_steps", "patience", "samples", "skip_nonfinite")
        faults = take_paths(self, "out")
        faults += check_counts(self, 0, *counts)
        faults += check_counts(self, 1, "keep_checkpoints", "sample_tokens")
        is_name = self.name is None or isinstance(self.name, str)
        faults += check(is_name, "name", self.name, "a string")
        for name in ("fast", "tensorboard"):
            value = getattr(self, name)
            faults += check(isinstance(value, bool), name, value, "true or false")
        faults += check_choice("save", self.save, SavedWeights)
        faults += check_choice("parallel", self.parallel, Parallel)
        raise_if(faults, self)

    def eval_interval(self, steps: int) -> int:
        """Return the steps between evaluations of a run of `steps` steps."""
        return self.eval_every_steps or max(MIN_EVAL_STEPS, math.ceil(steps / MAX_EVALUATIONS))

    def save_interval(self, steps: int) -> int:
        """Return the steps between checkpoints of a run of `steps` steps."""
        return self.save_every_steps or self.eval_interval(steps)


@documented
@dataclass(frozen=True)
class MemoryConfig(Settings):
    """GPU memory, and what the fused step stores, recomputes or offloads of the activations."""

    memory: MemoryMode = field(default="auto", metadata=DEVICE)
    """Activation checkpointing of the fused step; auto is the first mode that fits.

    none stores everything; cheap recomputes norms and SwiGLU, and gate and up in as many blocks as
    needed; full stores only block inputs; full+offload moves these to CPU memory."""
    memory_gb: float | None = field(default=None, metadata=DEVICE)
    """Memory that each GPU may use, in GB (10⁹ bytes). Default: nearly all that is free."""

    def __post_init__(self) -> None:
        faults = check_choice("memory", self.memory, MemoryMode)
        gb = self.memory_gb
        faults += [] if gb is None else check_positive("memory_gb", gb)
        raise_if(faults, self)


@documented
@dataclass(frozen=True)
class BaseWeights(Settings):
    """How the frozen linears of the base are stored."""

    base_dtype: BaseDtype = field(default="auto", metadata=DEVICE)
    """Frozen linears in nf4 (QLoRA), fp8, int8, original (plain), or auto: as they are stored.

    nf4 is a quarter of bf16 (bitsandbytes' format), fp8 half of it (float8_e4m3 with a scale per
    output; fast on H100 and H200), int8 too (a scale per output; for GPUs without fp8 matmuls).
    original is the compute dtype. So is auto, except for files in 4 bits, which stay as they are,
    and with from_adapter, where it is what that adapter was trained over."""
    nf4_block: int = field(default=64, metadata=DEVICE)
    """Values of an nf4 weight that share a scale: a power of two from 32 to 4096."""
    nf4_double_quant: bool = field(default=True, metadata=DEVICE)
    """Double quantization: store nf4's scales in 8 bits (bnb_4bit_use_double_quant)."""
    nf4_embeddings: bool = field(default=False, metadata=DEVICE)
    """Store the embedding and the output head in nf4 too."""

    def __post_init__(self) -> None:
        refuse_other_words("base_dtype", self.base_dtype, BaseDtype)
        allowed_blocks = f"one of {', '.join(map(str, NF4_BLOCKS))}"
        faults = check(is_nf4_block(self.nf4_block), "nf4_block", self.nf4_block, allowed_blocks)
        for name in ("nf4_double_quant", "nf4_embeddings"):
            value = getattr(self, name)
            faults += check(isinstance(value, bool), name, value, "true or false")
        raise_if(faults, self)
        own = self.nf4_settings.items()
        given = {name: value for name, value in own if value != getattr(BaseWeights, name)}
        if given and self.base_dtype != "nf4":
            shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise ConfigError(
                f"Cannot use {shown} with base_dtype={self.base_dtype!r}: it is for a base that is "
                "quantised to nf4 here. Add base_dtype=nf4, or leave it out; a model that is in 4 "
                "bits already has its own settings."
            )

    @property
    def is_quantised(self) -> bool:
        """Whether the frozen linears are stored as codes and scales."""
        return self.base_dtype not in ("auto", "original")

    @property
    def nf4_settings(self) -> dict[str, Any]:
        """The settings of nf4, by name."""
        return {name: value for name, value in vars(self).items() if name.startswith("nf4_")}


@documented
@dataclass(frozen=True)
class SamplingConfig(Settings):
    """How tokens are sampled."""

    max_new_tokens: int = field(default=256, metadata=GENERATION)
    """Maximum number of new tokens."""
    temperature: float = field(default=0.0, metadata=GENERATION)
    """Sampling temperature; 0 is greedy decoding."""
    top_k: int = field(default=0, metadata=GENERATION)
    """Sample from the k most likely tokens; 0 disables the limit."""
    top_p: float = field(default=1.0, metadata=GENERATION)
    """Nucleus sampling: sample from the most likely tokens with this total probability."""
    seed: int = field(default=0, metadata=GENERATION)
    """Sampling seed; prompt n of a batch uses seed + n."""

    def __post_init__(self) -> None:
        faults = check_counts(self, 1, "max_new_tokens")
        faults += check_counts(self, 0, "top_k")
        faults += check_seed("seed", self.seed)
        heat = self.temperature
        in_range = is_number(heat) and (heat == 0 or MIN_FRACTION <= heat <= MAX_NUMBER)
        allowed = f"0, or a finite number ≥ {MIN_FRACTION:g} and ≤ {MAX_NUMBER:g}"
        faults += check(in_range, "temperature", heat, allowed)
        in_range = is_number(self.top_p) and MIN_FRACTION <= self.top_p <= 1
        faults += check(in_range, "top_p", self.top_p, f"≥ {MIN_FRACTION:g} and ≤ 1")
        raise_if(faults, self)
