"""`lora demo`: a small model learns a real task in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lora.cli.flags.from_fields import GENERATION, OUTPUT, TRAINING
from lora.cli.flags.shared import Device, Json


def demo(
    *,
    steps: Annotated[int, Parameter(group=TRAINING)] = 75,
    learning_rate: Annotated[float, Parameter(group=TRAINING)] = 2e-3,
    seed: Annotated[int, Parameter(group=TRAINING)] = 0,
    answers: Annotated[int, Parameter(group=GENERATION)] = 40,
    out: Annotated[Path, Parameter(group=OUTPUT)] = Path("runs"),
    device: Device = "auto",
    json: Json = False,
) -> int:
    """Fine-tune a 135M model on order notes, and show its answers before and after.

    For example:

        lora demo
        lora demo --steps 2 --answers 2

    SmolLM2-135M-Instruct learns to turn notes into JSON, under five minutes on
    two cores. Words and phrasings of the test notes do not occur in training.

    Parameters
    ----------
    steps
        Optimizer steps of 4 notes each.
    learning_rate
        Peak learning rate.
    seed
        Random seed of the notes and of training.
    answers
        Test notes to answer, 1 to 1000.
    out
        Directory for the run directory.
    """
    from lora.cli.start.order_notes import DemoOptions, tell_story

    tell_story(DemoOptions(steps, learning_rate, seed, answers, out, device, json))
    return 0
