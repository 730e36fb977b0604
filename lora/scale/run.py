"""A run of `lora finetune` on several machines: what its start file is made of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora.config import TrainConfig
from lora.errors import ConfigError, gather
from lora.runs.record import RUN_FILE
from lora.settings.checks import check, is_int

MAX_NODES, MAX_DEVICES, MAX_RESTARTS = 4096, 64, 1000
"""Machines of a run, devices of each, and restarts after an error."""
_GPU = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class ScaledRun:
    """A run on `nodes` machines with `devices` processes each."""

    settings: Mapping[str, Any]
    """Of `lora finetune`, by name with underscores: what the user gave. A name is among them."""
    out: Path
    """Directory for run directories."""
    nodes: int
    devices: int
    """Of each machine: GPUs, or processes on a CPU."""
    max_restarts: int
    gpu: str | None = None
    """Type of GPU, as the scheduler calls it: H100."""
    directory: Path = Path()
    """Where relative paths of the settings begin."""
    made_by: str = ""
    """What wrote the file, for its head."""

    def __post_init__(self) -> None:
        faults = []
        for name, least, most in (
            ("nodes", 1, MAX_NODES),
            ("devices", 1, MAX_DEVICES),
            ("max_restarts", 0, MAX_RESTARTS),
        ):
            value = getattr(self, name)
            in_range = is_int(value) and least <= value <= most
            faults += check(in_range, name, value, f"a whole number from {least} to {most}")
        is_type = self.gpu is None or _GPU.fullmatch(self.gpu) is not None
        faults += check(is_type, "gpu", self.gpu, "a type of GPU such as H100 or A100-80GB")
        if faults:
            raise ConfigError(gather(faults, "Cannot write a start file:", "Change these values."))
        self._check_device()
        self._check_batch()

    @property
    def name(self) -> str:
        """Name of the run directory."""
        return str(self.settings["name"])

    @property
    def job_name(self) -> str:
        """`name` in letters that every scheduler takes."""
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip("-._")
        return plain if plain[:1].isalpha() else f"run-{plain}".rstrip("-")

    @property
    def record(self) -> Path:
        """The run's record: there once the run has begun."""
        return self.out / self.name / RUN_FILE

    @property
    def uses_gpus(self) -> bool:
        """Whether the processes compute on GPUs; else on the CPU."""
        return self.settings.get("device", "auto") != "cpu"

    def _check_device(self) -> None:
        device = str(self.settings.get("device", "auto"))
        if ":" in device and self.nodes * self.devices > 1:
            raise ConfigError(
                f"Cannot use --device {device} in several processes: each takes the GPU of its own "
                "number on its machine. Leave it out; CUDA_VISIBLE_DEVICES chooses which GPUs "
                "there are."
            )
        if self.gpu is not None and not self.uses_gpus:
            raise ConfigError(
                f"Cannot combine --gpu {self.gpu} with --device cpu, which uses no GPU. Leave one "
                "of them out."
            )

    def _check_batch(self) -> None:
        from lora.distributed.devices import check_batch
        from lora.distributed.world import World

        sizes = ("batch_size", "gradient_accumulation")
        if self.settings.get("resume") and not set(sizes) & self.settings.keys():
            return  # those of the run's record
        train = TrainConfig(**{key: self.settings[key] for key in sizes if key in self.settings})
        check_batch(train, World(size=self.nodes * self.devices))
