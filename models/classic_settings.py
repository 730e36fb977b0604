"""Settings of `training.py`: one dataclass, read strictly from environment variables.

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
from lora.settings.peers import FORMER_NAMES

AUTO = "auto"
TRUE_WORDS = ("true", "1", "yes", "on")
FALSE_WORDS = ("false", "0", "no", "off", "")
OTHER_PEOPLES = ("LORA_BENCH_DATA",)
USUAL_RANKS = range(4, 33)


@dataclass(frozen=True)
class ClassicSettings:
    """Settings of one run of the character model; LORA_USAGE.md has the texts under the fields."""

    use_lora: bool = False
    """Adapt a trained base model with LoRA instead of training all weights."""
    lora_rank: int = LoRAConfig.rank
    """LoRA rank; typically 4 to 32."""
    lora_alpha: float = LoRAConfig.alpha
    """LoRA alpha: updates are scaled by alpha / rank."""
    lora_dropout: float = LoRAConfig.dropout
    """Dropout probability on LoRA's inputs."""
    train_embeddings: bool = True
    """With LoRA, whether the two embedding tables are fully trained."""
    compare: bool = False
    """Adapt a trained base model with LoRA and with full fine-tuning, and compare the two."""
    compare_rates: str = ""
    """With COMPARE, learning rates of LoRA to try, comma-separated; empty tries none."""
    compare_full_rates: str = ""
    """With COMPARE_RATES, those of full fine-tuning; empty means a tenth of each."""
    test_mode: bool = False
    """A small model and few steps: under 30 seconds on two cores."""
    data_path: str = ""
    """Text file to train on; empty means the built-in prose (base model) or source code
    (adaptation)."""
    base_checkpoint: str = ""
    """Base model: a run directory, a model directory or a .pt state dict. `auto` trains one on the
    built-in prose or reuses it, which is also the default with LoRA."""
    output_dir: str = "runs"
    """Directory for run directories."""
    run_name: str = ""
    """Name of the run directory; empty means base, full or lora-rN."""
    seed: int = 1337
    """Random seed of the weights, the data order and dropout."""
    n_embd: int = 128
    """Model width; an adaptation keeps that of its base model."""
    n_head: int = 4
    """Attention heads."""
    n_layer: int = 4
    """Transformer blocks."""
    block_size: int = 128
    """Context length, in characters."""
    dropout: float = 0.0
    """Dropout probability of the model itself."""
    batch_size: int = 8
    """Batch size: sequences per optimizer step."""
    gradient_accumulation: int = 1
    """Gradient accumulation: split each batch into N forward and backward passes to save memory."""
    base_steps: int = 1500
    """Optimizer steps when a base model is trained."""
    max_steps: int = 600
    """Optimizer steps of an adaptation."""
    learning_rate: float = 0.0
    """Peak learning rate; 0 means a tuned one: 5e-3 for LoRA, 1e-3 for full fine-tuning, 2e-3 for
    a base model."""
    embedding_rate_fraction: float = TrainConfig.whole_rate_fraction
    """With LoRA, learning rate of the embeddings as a fraction of LEARNING_RATE."""
    eval_interval: int = 0
    """Steps between evaluations; 0 means at most ten in a run, at least ten steps apart."""
    device: str = AUTO
    """Device: auto, cpu, cuda, cuda:1, ..."""
    precision: str = AUTO
    """Compute dtype: auto, fp32 or bf16."""

    def __post_init__(self) -> None:
        faults = []
        for name in ("base_steps", "max_steps", "batch_size"):
            if getattr(self, name) < 1:
                faults.append(f"{name.upper()}={getattr(self, name)}: must be an int ≥ 1")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            faults.append(f"LEARNING_RATE={self.learning_rate}: must be a number ≥ 0")
        if self.eval_interval < 0:
            faults.append(f"EVAL_INTERVAL={self.eval_interval}: must be an int ≥ 0")
        if faults:
            raise ConfigError(gather(faults, "Cannot run with these settings:", "Change them."))
        if (self.compare_rates or self.compare_full_rates) and not self.compare:
            raise ConfigError(
                "Cannot use COMPARE_RATES without COMPARE=True. Set that, or unset COMPARE_RATES."
            )
        self.train_config()  # its checks, before anything is read or written
        LoRAConfig(rank=self.lora_rank, alpha=self.lora_alpha, dropout=self.lora_dropout)

    @property
    def adapts(self) -> bool:
        """Whether the run starts from a trained base model."""
        return self.use_lora or self.compare or bool(self.base_checkpoint)

    @property
    def rate(self) -> float:
        """Peak learning rate of the run."""
        return self.learning_rate or self._tuned_rate

    @property
    def _tuned_rate(self) -> float:
        if self.use_lora:
            return 5e-3
        return 1e-3 if self.adapts else 2e-3  # random weights take a higher one

    @property
    def steps(self) -> int:
        return self.max_steps if self.adapts else self.base_steps

    @property
    def auto_base_name(self) -> str:
        """Name of the automatic base model, made of all settings that change it."""
        sizes = f"{self.n_embd}x{self.n_layer}x{self.n_head}x{self.block_size}"
        return f"base-{sizes}-{self.base_steps}steps-seed{self.seed}"

    def for_base(self) -> ClassicSettings:
        """Return the settings that train the automatic base model: on prose, without LoRA."""
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
        """Return the settings of the optimization."""
        return TrainConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            gradient_accumulation=self.gradient_accumulation,
            learning_rate=self.rate,
            whole_rate_fraction=self.embedding_rate_fraction,
            weight_decay=0.0 if self.use_lora else 0.01,
            seed=self.seed,
        )

    def run_config(self) -> RunConfig:
        """Return the settings of the run directory and the evaluations."""
        return RunConfig(eval_every_steps=self.eval_interval, keep_checkpoints=1)


TEST_SIZES = {"n_embd": 64, "n_layer": 2, "block_size": 32, "base_steps": 300, "max_steps": 150}


def read_settings(environment: Mapping[str, str]) -> ClassicSettings:
    """Return the settings in `environment`; TEST_MODE gives what is not set small values.

    Raises ConfigError with all misspelt variables and invalid values.
    """
    environment = _with_new_names(environment)
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
        raise ConfigError(
            gather(faults, "Cannot use the environment:", "Correct it and run again.")
        )
    if values.get("test_mode"):
        values = TEST_SIZES | values
    return ClassicSettings(**values)


def _with_new_names(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` with settings under their former names under those of today."""
    renamed = dict(environment)
    for former, name in ((old.upper(), new.upper()) for old, new in FORMER_NAMES.items()):
        if former in renamed and name in renamed:
            raise ConfigError(
                f"Cannot use {former} together with {name}: it is the former name of the same "
                "setting. Unset one."
            )
        if former in renamed:
            renamed[name] = renamed.pop(former)
    return renamed


def notes(settings: ClassicSettings) -> list[str]:
    """Return notes on settings that are allowed and unusual."""
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
        # Variables of other programs are ignored, unless one is nearly a name of ours.
        unmistakable = [name for name in known if "_" in name]
        near = difflib.get_close_matches(variable, unmistakable, n=1, cutoff=0.85)
        if ours or near:
            hint = did_you_mean(variable, known) or f" Allowed: {', '.join(known)}."
            faults.append(f"{variable}: training.py has no such variable.{hint}")
    return faults


def _parse(word: str, kind: type) -> bool | int | float | str:
    if kind is bool:
        if word.lower() in TRUE_WORDS:
            return True
        if word.lower() in FALSE_WORDS:
            return False
        raise ValueError("must be True or False (or 1, 0, yes, no, on, off)")
    if kind is int:
        try:
            return int(word)
        except ValueError:
            raise ValueError("must be an integer") from None
    if kind is float:
        try:
            number = float(word)
        except ValueError:
            raise ValueError("must be a number") from None
        if not math.isfinite(number):
            raise ValueError("must be a finite number")
        return number
    return word
