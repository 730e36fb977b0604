"""The errors that lora raises on purpose, each also a built-in exception.

    LoraError
    ├── ConfigError (ValueError)       a setting: unknown, of the wrong type, out of range
    │   └── UnknownSettingError (TypeError)   a keyword that is no setting
    ├── TargetError (ValueError)       what LoRA should adapt does not fit the model
    ├── ModelError (ValueError)        a model's directory, architecture, names or shapes
    │   ├── ModelNotFoundError (FileNotFoundError)
    │   └── UnsupportedModelError (NotImplementedError)   no native decoder does what it needs
    ├── AdapterError (ValueError)      an adapter's files: missing, extra, misshapen, other base
    │   └── AdapterNotFoundError (FileNotFoundError)
    ├── DataError (ValueError)         text, examples, chat templates, tokenizers
    │   └── DataNotFoundError (FileNotFoundError)
    ├── CheckpointError (RuntimeError) a run directory or a checkpoint in it
    │   └── RunNotFoundError (FileNotFoundError)
    ├── TrainingError (RuntimeError)   training cannot continue: loss or gradient not finite
    ├── LostProcessError (RuntimeError)   another process of the same run has ended
    ├── Interrupted                    a signal stopped a run, its state saved
    └── DependencyError (ImportError)  an optional package that is not installed

In parentheses: the built-in exception that it also is, so `except ValueError` and the like work.
A path that does not exist is a …NotFoundError; its `errno` and `filename` are not set, the message
names the path. A disk that refuses a write is a CheckpointError, whose message says why.

A message says, in this order: what failed, what was seen, what is allowed (nearest match first),
what to do. The command line prints it without a traceback and exits with 2; after a signal with
129, 130 or 143.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_WORD_CHARACTERS = 200
"""Longer words are compared with nothing."""
MAX_FAULTS_CHARACTERS = 6_000
"""Of all faults in one message; each has the same share and loses its middle beyond it."""


class LoraError(Exception):
    """Base of all errors that lora raises on purpose."""


class ConfigError(LoraError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class UnknownSettingError(ConfigError, TypeError):
    """A keyword argument is no setting; Python's own error for it is a TypeError."""


class TargetError(LoraError, ValueError):
    """What LoRA should adapt does not fit the model."""


class ModelError(LoraError, ValueError):
    """A model's directory, architecture, tensor names or shapes cannot be used."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """The model's path does not exist."""


class UnsupportedModelError(ModelError, NotImplementedError):
    """A model's config.json is in order, and needs what is not implemented."""


class AdapterError(LoraError, ValueError):
    """An adapter's files are missing, damaged or made for another base."""


class AdapterNotFoundError(AdapterError, FileNotFoundError):
    """The adapter's directory does not exist."""


class DataError(LoraError, ValueError):
    """Text, examples, a chat template or a tokenizer cannot be used."""


class DataNotFoundError(DataError, FileNotFoundError):
    """The path of the examples, the text or the chat template does not exist."""


class CheckpointError(LoraError, RuntimeError):
    """A run directory or a checkpoint in it cannot be written or trusted.

    No OSError: most of these are about what a file says, not about the disk.
    """


class RunNotFoundError(CheckpointError, FileNotFoundError):
    """The run directory to resume does not exist."""


class TrainingError(LoraError, RuntimeError):
    """Training cannot continue, for example because the loss is no longer finite."""


class LostProcessError(LoraError, RuntimeError):
    """Another process of the same run has ended or does not answer: the cause is there."""


class Interrupted(LoraError):
    """A signal stopped a run between two steps; the command line exits with `exit_code`."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type[Interrupted], tuple[str, int]]:
        return type(self), (
            str(self),
            self.exit_code,
        )  # else pickle calls it with the message alone


class DependencyError(LoraError, ImportError):
    """An optional package is needed and not installed."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest match in `allowed`, or "" without one."""
    if len(word) > MAX_WORD_CHARACTERS:  # comparing takes the square of the length
        return ""
    others = [each for each in allowed if each != word]  # itself, it is wrong for another reason
    near = difflib.get_close_matches(word, others, n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def gather(faults: list[str], heading: str, advice: str, max_shown: int = 12) -> str:
    """Return one message: `heading`, the faults (at most `max_shown` of them), `advice`."""
    share = MAX_FAULTS_CHARACTERS // max(1, min(len(faults), max_shown))
    shown = "\n".join(f"  - {_without_middle(fault, share)}" for fault in faults[:max_shown])
    more = f"\n  … and {len(faults) - max_shown} more" if len(faults) > max_shown else ""
    return f"{heading}\n{shown}{more}\n{advice}"


def _without_middle(text: str, max_characters: int) -> str:
    half = max_characters // 2
    return text if len(text) <= max_characters else f"{text[:half]} … {text[-half:]}"
