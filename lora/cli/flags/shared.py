"""Flags that several commands have, each with one text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lora.cli.flags.from_fields import (
    DATA,
    DEVICE,
    GENERATION,
    LORA,
    OUTPUT,
    TRAINING,
    flags_from,
)
from lora.config import (
    BaseDtype,
    DataConfig,
    LoRAConfig,
    MemoryConfig,
    SamplingConfig,
    TrainConfig,
)

Model = Annotated[
    str | None,
    Parameter(
        group=DATA,
        help="Hugging Face model directory, .gguf file, or owner/name on the Hub. Default: "
        "SmolLM2-135M-Instruct.",
    ),
]
TrainingData = Annotated[
    Path,
    Parameter(
        group=DATA,
        help="Training examples: a JSONL, JSON, CSV, Parquet or text file, or a directory of them.",
    ),
]
ValidationData = Annotated[
    Path | None,
    Parameter(
        group=DATA, help="Validation examples. Default: --eval-fraction of --data is split off."
    ),
]
Adapter = Annotated[Path | None, Parameter(group=DATA, help="Adapter directory.")]
System = Annotated[str | None, Parameter(group=GENERATION, help="System prompt.")]
BaseWeights = Annotated[
    BaseDtype,
    Parameter(
        group=DEVICE,
        help="Storage dtype of the frozen linear layers: auto keeps the compute dtype, fp8 halves "
        "their memory and is faster on GPUs of compute capability 9.0 (H100, H200), slower on "
        "others.",
    ),
]
Device = Annotated[str, Parameter(group=DEVICE, help="Device: auto, cpu, cuda, cuda:1, ...")]
Deterministic = Annotated[
    bool,
    Parameter(
        group=DEVICE,
        help="Bit-for-bit reproducible on a GPU: PyTorch's deterministic algorithms and the "
        "unfused training step. Slower.",
    ),
]
Report = Annotated[
    bool,
    Parameter(
        group=OUTPUT,
        help="Write report.html, report.json and pictures into the run directory at the end.",
    ),
]
Resume = Annotated[
    bool,
    Parameter(group=OUTPUT, help="Resume the run called --name from its newest checkpoint."),
]
Overwrite = Annotated[
    bool,
    Parameter(
        group=OUTPUT,
        help="Replace what an earlier call wrote. Never replaced: inputs, links, devices.",
    ),
]
Json = Annotated[bool, Parameter(group=OUTPUT, help="Print the result as JSON.")]


def input_paths(*given: Path | str | None) -> tuple[Path, ...]:
    """Return those of a command's inputs that are on this disk: no output may replace them."""
    return tuple(Path(path) for path in given if path is not None and Path(path).exists())


@flags_from(LoRAConfig, LORA)
class LoRAFlags:
    """The adapter."""


@flags_from(TrainConfig, TRAINING)
class TrainFlags:
    """Optimization."""


@flags_from(DataConfig, DATA)
class DataFlags:
    """Reading, tokenizing and packing of the examples."""


@flags_from(MemoryConfig, DEVICE)
class MemoryFlags:
    """GPU memory."""


@flags_from(SamplingConfig, GENERATION)
class SamplingFlags:
    """Generation."""
