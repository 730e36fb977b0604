"""The task of a training job: its data, how they are read, and the base model."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from lora.config import BaseDtype, BaseWeights, DataConfig, ImplementationName
from lora.data.reading.readers import Source
from lora.data.reading.splitting import settings_of_split
from lora.errors import ConfigError, gather
from lora.settings.base import Settings

UNUSED_ADVICE = "Leave them out."


@dataclass(frozen=True)
class Task(Settings):
    """Training and validation data, and the base model; what every kind of job begins with."""

    data: Source
    """A file or directory of examples, or a list of dicts."""
    model: str | None = None
    """A directory, a .gguf file or a hub's owner/name; None: SmolLM2-135M-Instruct."""
    eval_data: Source | None = None
    """Validation examples; None splits some off `data`."""
    data_config: DataConfig = field(default_factory=DataConfig, kw_only=True)
    implementation: ImplementationName = field(default="auto", kw_only=True)
    """Code that runs the model: native, or transformers for any causal language model; auto:
    native if it can.

    A resumed run, and commands on an adapter or a run, use what was recorded."""

    def why_split_is_unused(self) -> list[str]:
        """Return what was given for a split of `data` that `eval_data` makes needless."""
        return why_split_is_unused(self.data_config, self.eval_data)

    def check_split(self) -> None:
        """Raise ConfigError for settings of a split beside `eval_data`."""
        faults = self.why_split_is_unused()
        if faults:
            raise ConfigError(gather(faults, "Cannot use all of these settings:", UNUSED_ADVICE))


@dataclass(frozen=True, kw_only=True)
class LoRATask(Task):
    """A task in which LoRA trains: how its frozen base is stored."""

    base_dtype: BaseDtype = "auto"
    """As in BaseWeights, like the three below."""
    nf4_block: int = BaseWeights.nf4_block
    nf4_double_quant: bool = BaseWeights.nf4_double_quant
    nf4_embeddings: bool = BaseWeights.nf4_embeddings

    @property
    def base_weights(self) -> BaseWeights:
        """How the frozen linears are stored. Raises ConfigError for what is not allowed."""
        return BaseWeights(**self.base_settings)

    @property
    def recorded_base(self) -> dict[str, Any]:
        """What a run's record has of the base by field: None where it is not quantised."""
        base = self.base_weights
        is_nf4 = base.base_dtype == "nf4"
        return {
            "base_dtype": base.base_dtype if base.is_quantised else None,
            "nf4": base.nf4_settings if is_nf4 else None,
        }

    @property
    def base_settings(self) -> dict[str, Any]:
        """The settings of the base by name, as they were given."""
        return {each.name: getattr(self, each.name) for each in fields(BaseWeights)}


def why_split_is_unused(config: DataConfig, eval_data: Source | None) -> list[str]:
    """Return the settings of a split that `eval_data` makes needless."""
    if eval_data is None:
        return []
    return [
        f"{setting}: nothing is split off, because eval_data is given"
        for setting in settings_of_split(config)
    ]
