"""The record of a run: what its files hold, as typed, versioned dataclasses. No torch.

    run.json        RunRecord        configuration, data, environment; written when the run starts
    metrics.jsonl   MetricsRow       reproducible to the byte
    timings.jsonl   TimingRow        not reproducible
    samples.jsonl   SampleRow        answers to validation prompts
    result.json     RunResult        what the run ended with

Every job writes these, report, resume, sweep and compare read them. Losses are in nats per learned
token, times in seconds, sizes in bytes.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import platform
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from lora.runs.typed_json import WRITES_NULL, to_json

SCHEMA_VERSION = 1
"""Of run.json; grows when a key changes its meaning. Files of version 0 have no such key."""
RUN_FILE, RESULT_FILE = "run.json", "result.json"
METRICS_FILE, TIMINGS_FILE, SAMPLES_FILE = "metrics.jsonl", "timings.jsonl", "samples.jsonl"

IN_MEMORY = "rows given in Python"
"""The source of data that are no file."""

Kind = Literal["finetune", "sweep", "candidate", "compare", "member", "character"]
"""What a run directory is of: a finetune job, a sweep or one of its candidates, a comparison or one
of its members that is not a finetune job, or a run of training.py."""
Method = Literal["lora", "full", "peft"]


@dataclass(frozen=True)
class PromptFormat:
    """How a model was prompted in training, and is to be prompted in use."""

    style: Literal["chat", "raw"] = "chat"
    """Through the chat template, or as plain text."""
    completions: Literal["turns", "raw"] | None = None
    """What rows of prompt and completion became: a user and an assistant turn, or plain text."""
    system: str | None = None
    """System prompt of all training conversations; None if they have none or different ones."""
    template: str | None = None
    """Template that made all training examples of their columns, as `DataConfig.template`."""
    label_template: str | None = None
    """Template of the rows of a classification."""
    labels: tuple[str, ...] | None = None
    """Labels of these rows."""


@dataclass(frozen=True)
class DataRecord:
    """Which examples a run learns from."""

    source: str | None = None
    """A path, or `IN_MEMORY`."""
    eval_source: str | None = field(default=None, metadata=WRITES_NULL)
    in_memory: bool | None = None
    """Whether the rows were given in Python: no command line can name them."""
    examples: int | None = None
    held_out_examples: int | None = None
    rows: int | None = None
    """Packed sequences."""
    learned_tokens: int | None = None
    counts: dict[str, int] | None = None
    """Of examples that were cut, split or dropped."""
    chat_template: str | None = None
    """Where it comes from, in words."""
    prompt_format: PromptFormat | None = None
    now: str | None = None
    """The run's start, ISO 8601: the date that the chat template sees, in a resumed run too."""
    fingerprint: str | None = None
    held_out_fingerprint: str | None = None
    warnings: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Environment:
    """Package versions and the kind of machine, without its name or any path."""

    python: str | None = None
    platform: str | None = None
    cpu_count: int | None = None
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepSettings:
    """What makes two sweeps the same: resuming with other values is refused."""

    grid: dict[str, list[Any]]
    """The values to try, by setting."""
    halving: bool
    steps: int
    """Optimizer steps of a candidate."""


@dataclass(frozen=True)
class RunRecord:
    """All of run.json. The configuration's sections hold the fields of the config dataclasses."""

    kind: Kind = "finetune"
    schema_version: int = SCHEMA_VERSION
    method: Method | None = None
    """What trains; None for a sweep or a comparison, and where an old file does not tell."""
    model: str | None = None
    model_source: str | None = None
    """As the user named it; None is the default model."""
    base: str | None = None
    """Of a character model: the path of the base; of a member of any model: its name."""
    base_fingerprint: str | None = None
    base_parameters: int | None = None
    device: str | None = None
    threads: int | None = None
    learning_rate: float | None = None
    """The peak, as resolved."""
    from_adapter: str | None = None
    from_adapter_fingerprint: str | None = None
    """Of its settings and tensors: a path alone does not tell whether it is the same adapter."""
    base_dtype: str | None = None
    nf4: dict[str, Any] | None = None
    """Of a base in nf4: its settings."""
    implementation: str | None = None
    """The code that ran the model: native or transformers; None in older files, where it was
    native, and for models of other code."""
    deterministic: bool | None = None
    activation_checkpointing: dict[str, Any] | None = None
    """What the fast step stores of each block's activations: a resumed run must do the same."""
    ran_out_of_memory: tuple[str, ...] | None = None
    """What `memory: auto` tried before that: modes with which the first step ran out of memory,
    each with the memory planned for it."""
    world_size: int | None = None
    """Processes that trained together; None: one."""
    parallel: str | None = None
    """What they divide: ddp the data, fsdp the weights too; None with one process."""
    at_once: int | None = None
    lora: dict[str, Any] | None = None
    train: dict[str, Any] | None = None
    data_config: dict[str, Any] | None = None
    run: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None
    """Of training.py."""
    sweep: SweepSettings | None = None
    compare: dict[str, Any] | None = None
    data: DataRecord = field(default_factory=DataRecord)
    environment: Environment | None = None

    @property
    def has_gguf(self) -> bool:
        """Whether its model is offered as a GGUF file, which only native decoders write."""
        return self.implementation != "transformers"

    def to_json(self) -> dict[str, Any]:
        """Return what run.json holds."""
        nulls = dict.fromkeys(_NULL_KEYS[self.kind])  # these tell something when they are null
        return {**nulls, **to_json(self)}


_NULL_KEYS: dict[Kind, tuple[str, ...]] = {
    "finetune": ("model_source", "lora", "from_adapter"),
    "sweep": ("model_source",),
    "candidate": ("model_source", "sweep"),
    "compare": (),
    "member": (),
    "character": ("base",),
}


@dataclass(frozen=True)
class MetricsRow:
    """A row of metrics.jsonl: an optimizer step, or an evaluation after it."""

    step: int
    loss: float | None = None
    """Training loss of the step."""
    learning_rate: float | None = None
    gradient_norm: float | None = None
    """Before clipping."""
    tokens: int | None = None
    """Learned tokens of all steps so far."""
    spike: bool | None = None
    skipped: int | None = None
    """Steps left out so far: loss or gradient of this one were not finite."""
    eval_loss: float | None = None
    eval_not_finite: str | None = None
    """The evaluation's loss where it is not finite: nan or inf."""


@dataclass(frozen=True)
class TimingRow:
    """A row of timings.jsonl: an optimizer step."""

    step: int
    step_s: float | None = None
    """Evaluations and saves left out."""
    peak_memory_bytes: int | None = None
    """So far."""


@dataclass(frozen=True)
class SampleRow:
    """A row of samples.jsonl: what the model answered at an evaluation."""

    step: int
    prompt: str = ""
    answer: str = ""
    reference: str | None = field(default=None, metadata=WRITES_NULL)
    """The answer in the data; None if there is none."""
    tokens: int | None = None
    ended: bool | None = None
    """Whether the answer came to its end: False if it was cut at the most tokens allowed."""


@dataclass(frozen=True)
class PlannedMemory:
    """Peak memory in bytes by part, planned before the weights were loaded."""

    weights: int | None = None
    gradients: int | None = None
    optimizer: int | None = None
    activations: int | None = None
    loss: int | None = None
    other: int | None = None
    total: int | None = None
    parameters: int | None = None
    trained_parameters: int | None = None
    step: str | None = None
    """Which step it is planned for: fast or plain."""
    reason: str | None = None
    """Why the fast step stores what it stores, in words."""
    keep: dict[str, Any] | None = field(default=None, metadata=WRITES_NULL)
    """As `RunRecord.activation_checkpointing`."""


@dataclass(frozen=True)
class MemoryResult:
    """Planned and measured peak memory."""

    measured_bytes: int | None = None
    error_fraction: float | None = None
    """Planned / measured - 1."""
    planned: PlannedMemory = field(default_factory=PlannedMemory)


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters."""

    trainable: int
    base: int


@dataclass(frozen=True)
class RunResult:
    """All of result.json of a single run."""

    steps: int
    eval_loss: float
    """At the end; NaN where there is no validation data."""
    train_s: float
    """In steps; evaluations and saves left out."""
    n_tokens: int
    peak_memory_bytes: int
    best_eval_loss: float = math.nan
    stopped_early: bool = False
    start_eval_loss: float | None = None
    """Before the first step."""
    best_step: int | None = None
    """Of `best_eval_loss`; 0 is the start."""
    saved_step: int | None = None
    """The step whose weights are in adapter/ or model/; None in files of older versions, which
    saved the last."""
    saved_eval_loss: float | None = None
    diverged: bool = False
    """Whether the loss of the saved weights is far above that of the start."""
    warnings: tuple[str, ...] = ()
    n_processed_tokens: int | None = None
    """Learned or not, padding left out."""
    memory: MemoryResult | None = None
    stored_bytes: dict[str, int] | None = None
    """Of the tensors in the directories adapter, model and base."""
    parameters: ParameterCount | None = None


def describe_environment() -> Environment:
    """Return the versions of the packages in use and the kind of this machine."""
    versions = {}
    used = ("transformers",) if "transformers" in sys.modules else ()
    for package in ("lora-lm", "torch", "safetensors", "tokenizers", "numpy", *used):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return Environment(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        cpu_count=os.cpu_count(),
        versions=versions,
    )
