"""Every error that lora raises on purpose.

    LoraError
    ├── ConfigError       a setting: unknown, of the wrong type, out of range
    ├── TargetError       what LoRA should adapt does not fit the model
    ├── ModelError        a model's folder, architecture, names or shapes
    ├── AdapterError      an adapter's files: missing, extra, misshapen, of another base
    ├── DataError         text, examples, chat templates, tokenizers
    ├── CheckpointError   a run's folder or a checkpoint in it
    ├── TrainingError     a run that cannot go on: loss or gradient not finite
    ├── Interrupted       a run that a signal stopped, its state saved
    └── DependencyError   an optional package that is not installed

A message says, in this order: what was asked, what was seen, what is allowed (nearest match
first), what to do. The command line prints it without a traceback and exits 2; after a signal 130
or 143.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoraError(Exception):
    """Base of all errors that lora raises on purpose."""


class ConfigError(LoraError):
    """A setting is unknown, of the wrong type or out of range."""


class TargetError(LoraError):
    """What LoRA should adapt does not fit the model."""


class ModelError(LoraError):
    """A model's folder, architecture, tensor names or shapes cannot be used."""


class AdapterError(LoraError):
    """An adapter's files are missing, damaged or made for another base."""


class DataError(LoraError):
    """Text, examples, a chat template or a tokenizer cannot be used."""


class CheckpointError(LoraError):
    """A run's folder or a checkpoint in it cannot be written or trusted."""


class TrainingError(LoraError):
    """A run cannot go on, for example because the loss is no longer finite."""


class Interrupted(LoraError):
    """A signal stopped a run between two steps; the command line exits with `exit_code`."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class DependencyError(LoraError):
    """An optional package is needed and not installed."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest of `allowed`, or "" if none is near."""
    near = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def gather(faults: list[str], heading: str, advice: str, most: int = 12) -> str:
    """Return one message that lists `faults` under `heading`, `most` of them, then `advice`."""
    shown = "\n".join(f"  - {fault}" for fault in faults[:most])
    more = f"\n  … and {len(faults) - most} more" if len(faults) > most else ""
    return f"{heading}\n{shown}{more}\n{advice}"
