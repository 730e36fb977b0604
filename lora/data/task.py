"""The task of a training job: its data, how they are read, and the base model."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora.config import DataConfig
from lora.data.reading.readers import Source
from lora.settings.base import Settings


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
