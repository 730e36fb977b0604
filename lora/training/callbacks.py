"""Functions of a user that the training loop calls: after steps, evaluations and saves.

class StopWhenGood(lora.Callback):
    def on_eval(self, event):
        if event.eval_loss < 0.1:
            raise lora.StopTraining("good enough")

lora.finetune("orders.jsonl", callbacks=StopWhenGood())
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lora.errors import ConfigError


class StopTraining(Exception):
    """Raised by a callback: the run ends after this step, evaluated and saved as at its end."""


@dataclass(frozen=True)
class TrainingEvent:
    """Where the run is."""

    step: int
    """Steps taken."""
    total_steps: int
    """Steps of the whole run."""
    folder: Path
    """The run directory."""
    model: nn.Module
    """The model in training; do not change it. On a GPU it may be one step ahead of `on_step`."""


@dataclass(frozen=True)
class StepEvent(TrainingEvent):
    """A step was taken; skipped steps make no event."""

    loss: float
    """Mean over the step's target tokens, nats."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    n_tokens: int
    """Target tokens of the run so far."""


@dataclass(frozen=True)
class EvalEvent(TrainingEvent):
    """An evaluation was made; that of the start has step 0."""

    eval_loss: float
    """Mean over the target tokens of the validation data, nats; NaN if it is not finite."""
    best_eval_loss: float
    is_best: bool
    """Whether this is the best evaluation of the run so far."""


@dataclass(frozen=True)
class SaveEvent(TrainingEvent):
    """A checkpoint was written."""

    checkpoint: Path
    is_best: bool
    """Whether these weights have the best validation loss so far."""


class Callback:
    """Called by the training loop; subclass it and write the methods that are needed.

    Raise `StopTraining` to end the run as early stopping does. Any other exception ends it too: a
    checkpoint of what was learned is saved first, then the exception goes on to the caller, and
    `resume` continues the run.

    Of several processes that train together rank 0 calls them. All processes end in the same step:
    `StopTraining` in `on_step` ends the run one step later than in one process.
    """

    def on_step(self, event: StepEvent) -> None:
        """Called after each step, once its loss is known: on a GPU, one step later."""

    def on_eval(self, event: EvalEvent) -> None:
        """Called after each evaluation."""

    def on_save(self, event: SaveEvent) -> None:
        """Called after each checkpoint; a stop asked for here comes after the next step."""


Callbacks = Callback | Sequence[Callback]
"""What functions take: one, or several, which are called in order."""


def as_callbacks(given: Callbacks) -> tuple[Callback, ...]:
    """Return the callbacks as a tuple. Raises ConfigError for what is none."""
    if isinstance(given, Callback):
        return (given,)
    is_list = isinstance(given, Sequence)
    wrong = [one for one in given if not isinstance(one, Callback)] if is_list else [given]
    if wrong:
        kind = wrong[0].__name__ if isinstance(wrong[0], type) else type(wrong[0]).__name__
        raise ConfigError(
            f"Cannot use a {kind} as a callback. Allowed: objects of a subclass of lora.Callback, "
            "one or a list of them. Write class Mine(lora.Callback) with on_step, on_eval or "
            "on_save, and give Mine()."
        )
    return tuple(given)


def call_all(callbacks: Sequence[Callback], call: Callable[[Callback], None]) -> str | None:
    """Call every callback, and return why one of them stops the run; None: none does."""
    why = None
    for callback in callbacks:
        try:
            call(callback)
        except StopTraining as stop:
            why = f"{type(callback).__name__} stops the run" + (f": {stop}" if str(stop) else "")
    return why
