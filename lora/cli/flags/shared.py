"""Flags that several commands have, each with one text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, Token

from lora.cli.flags.from_fields import (
    DATA,
    DEVICE,
    GENERATION,
    MODEL,
    OUTPUT,
    field_texts,
    flags_from,
)
from lora.config import (
    BaseDtype,
    BaseWeights,
    DataConfig,
    ImplementationName,
    LoRAConfig,
    MemoryConfig,
    SamplingConfig,
    TrainConfig,
)
from lora.data.task import Task
from lora.errors import ConfigError
from lora.inference.checkpoints.find import find_adapter

Model = Annotated[
    str | None,
    Parameter(
        group=MODEL,
        help="Hugging Face directory, .gguf file or owner/name. Default: SmolLM2-135M-Instruct, "
        "from 4-bit weights.",
    ),
]
Implementation = Annotated[
    ImplementationName, Parameter(group=MODEL, help=field_texts(Task)["implementation"])
]
TrainingData = Annotated[
    Path,
    Parameter(
        group=DATA,
        help="JSONL, JSON, CSV, Parquet or text file, directory, or owner/name[:split] on the Hub.",
    ),
]
ValidationData = Annotated[
    Path | None,
    Parameter(
        group=DATA,
        help="Validation examples. Default: those of --data, or --eval-fraction of it, split off.",
    ),
]


def open_adapter(kind: object, tokens: Sequence[Token]) -> Path:
    """Return the directory of the adapter that a flag names; cyclopts calls it."""
    return find_adapter(tokens[0].value)


Adapter = Annotated[
    Path | None,
    Parameter(
        group=MODEL,
        help="Adapter: directory, run, or checkpoint (runs/x@500, @best). Brings its base.",
        converter=open_adapter,
    ),
]
System = Annotated[
    str | None, Parameter(group=GENERATION, help="System prompt. Default: as in training.")
]
AnswerBase = Annotated[
    BaseDtype,
    Parameter(
        group=DEVICE,
        help="Base's linears: auto (as in training, unpacked if they fit), original (unquantised), "
        "or packed.",
    ),
]
MergedBase = Annotated[
    BaseDtype,
    Parameter(
        group=MODEL,
        help="Values to merge into: auto (those trained over), original (unquantised), or those "
        "of nf4, int8 or fp8.",
    ),
]
Device = Annotated[str, Parameter(group=DEVICE, help="Device: auto, cpu, cuda, cuda:1, ...")]
Devices = Annotated[
    int | Literal["all"] | None,
    Parameter(
        group=DEVICE,
        help="GPUs of this machine to use, one process each: a number, or all. Default: 1, or "
        "what torchrun started.",
    ),
]
Deterministic = Annotated[
    bool,
    Parameter(
        group=DEVICE,
        help="Bit-for-bit reproducible on a GPU, with the unfused training step. Slower.",
    ),
]
Report = Annotated[
    bool,
    Parameter(
        group=OUTPUT,
        help="Write report.html into the run directory at the end.",
    ),
]
Resume = Annotated[
    bool,
    Parameter(
        group=OUTPUT,
        help="Resume the run --name from its newest checkpoint, with its settings.",
    ),
]
Overwrite = Annotated[
    bool,
    Parameter(
        group=OUTPUT,
        help="Replace what an earlier call wrote. Never replaced: inputs, links, devices.",
    ),
]
Json = Annotated[bool, Parameter(group=OUTPUT, help="Print the result as JSON.")]


def check_overwrite(overwrite: bool, output: Path | None, flag: str) -> None:
    """Raise ConfigError for --overwrite where `flag` names no `output` that it could replace."""
    if overwrite and output is None:
        raise ConfigError(
            f"Cannot use --overwrite without {flag}: there is no file to replace. Name one, or "
            "leave the flag out."
        )


@flags_from(LoRAConfig)
class LoRAFlags:
    """The adapter."""


@flags_from(TrainConfig)
class TrainFlags:
    """Optimization."""


@flags_from(DataConfig)
class DataFlags:
    """Reading, tokenizing and packing of the examples."""


@flags_from(MemoryConfig)
class MemoryFlags:
    """GPU memory."""


@flags_from(BaseWeights)
class BaseFlags:
    """How the frozen linears are stored."""


@flags_from(SamplingConfig)
class SamplingFlags:
    """Generation."""
