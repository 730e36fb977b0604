"""The environment variables that drive `training.py`: one dataclass, read strictly.

A variable is its field's name in capitals: `LORA_RANK` fills `lora_rank`. No torch here.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from lora.config import LoRAConfig, RunConfig, TrainConfig
from lora.errors import ConfigError, did_you_mean, gather

AUTO = "auto"
TRUE_WORDS = ("true", "1", "yes", "on")
FALSE_WORDS = ("false", "0", "no", "off", "")
OTHER_PEOPLES = ("LORA_BENCH_DATA",)
USUAL_RANKS = range(4, 33)


@dataclass(frozen=True)
class ClassicSettings:
    """One run of the character model; the text under a field is what the guide says of it."""

    use_lora: bool = False
    """Adapt a trained base through LoRA instead of training all of a model."""
    lora_rank: int = LoRAConfig.rank
    """Rank of A and B; 4 to 32 is usual."""
    lora_alpha: float = LoRAConfig.alpha
    """LoRA's output is scaled by alpha / rank."""
    lora_dropout: float = LoRAConfig.dropout
    """Share of LoRA's inputs set to zero in training."""
    train_embeddings: bool = True
    """With LoRA, whether the two embedding tables train whole."""
    compare: bool = False
    """Adapt a trained base through LoRA and by full fine-tuning, and compare the two."""
    compare_rates: str = ""
    """With COMPARE, rates for LoRA to try, with commas between; empty tries none."""
    compare_full_rates: str = ""
    """With COMPARE_RATES, those of full fine-tuning; empty takes a tenth of each."""
    test_mode: bool = False
    """A small model and few steps: under 30 seconds on two cores."""
    data_path: str = ""
    """A text file; empty takes the built-in prose (base) or source code (adaptation)."""
    base_checkpoint: str = ""
    """A saved base: a run's folder, a model's folder or a .pt state dict. `auto` trains or reuses
    one on the built-in prose, which is also what LoRA does when this is empty."""
    output_dir: str = "runs"
    """Folder that holds the runs."""
    run_name: str = ""
    """Name of the run's folder; empty takes base, full or lora-rN."""
    seed: int = 1337
    """Seed of weights, order of the text and dropout."""
    n_embd: int = 128
    """Model width; of a base, kept in an adaptation."""
    n_head: int = 4
    """Attention heads."""
    n_layer: int = 4
    """Blocks."""
    block_size: int = 128
    """Characters the model sees at once."""
    dropout: float = 0.0
    """Dropout of the model itself."""
    batch_size: int = 8
    """Rows of one step."""
    micro_batches: int = 1
    """Parts that a step's rows are split into to save memory."""
    base_steps: int = 1500
    """Steps of training a base."""
    max_steps: int = 600
    """Steps of an adaptation."""
    learning_rate: float = 0.0
    """Peak rate; 0 takes the tuned one: 5e-3 for LoRA, 1e-3 for full fine-tuning, 2e-3 for a
    base."""
    embedding_rate_fraction: float = TrainConfig.whole_rate_fraction
    """With LoRA, the embeddings' rate as a share of the learning rate."""
    eval_interval: int = 0
    """Steps between evaluations; 0 makes at most ten, at least ten steps apart."""
    device: str = AUTO
    """auto, cpu, cuda, cuda:1 …"""
    precision: str = AUTO
    """auto, fp32 or bf16."""

    def __post_init__(self) -> None:
        faults = []
        for name in ("base_steps", "max_steps", "batch_size"):
            if getattr(self, name) < 1:
                faults.append(f"{name.upper()}={getattr(self, name)}: allowed is an int ≥ 1")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            faults.append(f"LEARNING_RATE={self.learning_rate}: allowed is a number ≥ 0")
        if self.eval_interval < 0:
            faults.append(f"EVAL_INTERVAL={self.eval_interval}: allowed is an int ≥ 0")
        if faults:
            raise ConfigError(gather(faults, "Settings out of range:", "Change them."))
        if (self.compare_rates or self.compare_full_rates) and not self.compare:
            raise ConfigError("COMPARE_RATES is for COMPARE=True. Set that too, or unset this.")
        self.train_config()  # the library's own checks, before anything is read or written
        LoRAConfig(rank=self.lora_rank, alpha=self.lora_alpha, dropout=self.lora_dropout)

    @property
    def adapts(self) -> bool:
        """Whether the run starts from a trained base."""
        return self.use_lora or self.compare or bool(self.base_checkpoint)

    @property
    def rate(self) -> float:
        """Peak learning rate of the run."""
        return self.learning_rate or self._tuned_rate

    @property
    def _tuned_rate(self) -> float:
        if self.use_lora:
            return 5e-3
        return 1e-3 if self.adapts else 2e-3  # from random weights more

    @property
    def steps(self) -> int:
        return self.max_steps if self.adapts else self.base_steps

    @property
    def auto_base_name(self) -> str:
        """Name of the automatic base: it changes with whatever changes the base."""
        sizes = f"{self.n_embd}x{self.n_layer}x{self.n_head}x{self.block_size}"
        return f"base-{sizes}-{self.base_steps}steps-seed{self.seed}"

    def for_base(self) -> ClassicSettings:
        """Return the settings that train the automatic base: on prose, without LoRA."""
        return dataclasses.replace(
            self,
            use_lora=False,
            compare=False,
            compare_rates="",
            compare_full_rates="",
            data_path="",
            base_checkpoint="",
            learning_rate=0.0,
            run_name=self.auto_base_name,
        )

    def train_config(self) -> TrainConfig:
        """Return the optimisation's settings."""
        return TrainConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            micro_batches=self.micro_batches,
            learning_rate=self.rate,
            whole_rate_fraction=self.embedding_rate_fraction,
            weight_decay=0.0 if self.use_lora else 0.01,
            seed=self.seed,
        )

    def run_config(self) -> RunConfig:
        """Return what concerns the run's folder."""
        return RunConfig(eval_every_steps=self.eval_interval, keep_checkpoints=1)


TEST_SIZES = {"n_embd": 64, "n_layer": 2, "block_size": 32, "base_steps": 300, "max_steps": 150}


def read_settings(environment: Mapping[str, str]) -> ClassicSettings:
    """Return the settings that `environment` asks for; TEST_MODE makes what is not set small.

    Raises ConfigError for a misspelt variable or a value that does not fit, all of them at once.
    """
    hints = get_type_hints(ClassicSettings)
    known = {field.name.upper(): field.name for field in fields(ClassicSettings)}
    faults = _misspelt(environment, list(known))
    values: dict[str, Any] = {}
    for variable, name in known.items():
        if variable in environment:
            try:
                values[name] = _parse(environment[variable].strip(), hints[name])
            except ValueError as error:
                faults.append(f"{variable}={environment[variable]!r}: {error}")
    if faults:
        raise ConfigError(gather(faults, "The environment does not fit:", "Mend it, run again."))
    if values.get("test_mode"):
        values = TEST_SIZES | values
    return ClassicSettings(**values)


def notes(settings: ClassicSettings) -> list[str]:
    """Return what a user should hear about settings that are allowed and unusual."""
    uses_lora = settings.use_lora or settings.compare
    if uses_lora and settings.lora_rank not in USUAL_RANKS:
        usual = f"{USUAL_RANKS.start} to {USUAL_RANKS.stop - 1}"
        return [f"note: LORA_RANK={settings.lora_rank} is outside the usual {usual}"]
    return []


def _misspelt(environment: Mapping[str, str], known: list[str]) -> list[str]:
    faults = []
    for variable in environment:
        if variable in known or variable in OTHER_PEOPLES:
            continue
        ours = variable.startswith("LORA_")
        # Others' variables are left alone unless they are a slip away from a name like ours.
        unmistakable = [name for name in known if "_" in name]
        near = difflib.get_close_matches(variable, unmistakable, n=1, cutoff=0.85)
        if ours or near:
            hint = did_you_mean(variable, known) or f" Allowed: {', '.join(known)}."
            faults.append(f"{variable} is no variable of training.py.{hint}")
    return faults


def _parse(word: str, kind: type) -> bool | int | float | str:
    if kind is bool:
        if word.lower() in TRUE_WORDS:
            return True
        if word.lower() in FALSE_WORDS:
            return False
        raise ValueError("allowed are True and False (also 1, 0, yes, no, on, off)")
    if kind is int:
        try:
            return int(word)
        except ValueError:
            raise ValueError("allowed is a whole number") from None
    if kind is float:
        try:
            number = float(word)
        except ValueError:
            raise ValueError("allowed is a number") from None
        if not math.isfinite(number):
            raise ValueError("allowed is a finite number")
        return number
    return word
