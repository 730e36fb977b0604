"""The character GPT's demo: a base learns prose, then code by full fine-tuning and by LoRA.

    python demo_classic.py              # about four minutes on two cores
    python demo_classic.py --quick      # a small version, half a minute

Every run is its own subprocess (`training.py`), so that each peak memory is its own.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from lora.errors import LoraError, TrainingError
from lora.report import draw_loss_curves
from lora.runs.disk import atomic_write, read_json
from lora.runs.read_record import read_metrics, read_result
from lora.runs.record import MetricsRow, RunResult
from lora.terminal import print_note, printable_answer

HERE = Path(__file__).resolve().parent


def lora_variables(rank: int, rate: str) -> dict[str, str]:
    """Return the variables of a LoRA run; alpha is twice the rank."""
    chosen = {"LORA_RANK": str(rank), "LORA_ALPHA": str(2 * rank), "LEARNING_RATE": rate}
    return {"RUN_NAME": f"lora-r{rank}", "USE_LORA": "True", **chosen}


# Each method at the best of the rates tried for it: see benchmarks/char_rates.py.
ADAPTATIONS = [
    {"RUN_NAME": "full", "LEARNING_RATE": "1e-3"},
    lora_variables(8, "5e-3"),
    lora_variables(32, "2.5e-3"),
]
DEMO = {"BASE_STEPS": "1500", "MAX_STEPS": "400"}
QUICK = {"TEST_MODE": "True", "BASE_STEPS": "150", "MAX_STEPS": "60"}


@dataclass(frozen=True)
class Outcome:
    """What the run directory of one run holds."""

    name: str
    rows: list[MetricsRow]
    result: RunResult
    samples: dict[str, str]

    @property
    def first_loss(self) -> float:
        return next(row.eval_loss for row in self.rows if row.eval_loss is not None)

    @property
    def last_loss(self) -> float:
        return self.result.eval_loss

    @property
    def trained_fraction(self) -> float:
        """Trained parameters / those of the base."""
        assert self.result.parameters is not None
        return self.result.parameters.trainable / self.result.parameters.base

    @property
    def stored_bytes(self) -> int:
        """Of the adapter, or of the whole model."""
        sizes = self.result.stored_bytes or {}
        return sizes["adapter"] if "adapter" in sizes else sizes["model"]


def main() -> int:
    """Run the story; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a small one, half a minute")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/demo-DATE)")
    arguments = parser.parse_args()
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    out = arguments.out or Path("runs") / f"demo-classic-{now}"
    try:
        tell_story(out, QUICK if arguments.quick else DEMO)
    except LoraError as error:
        print_note(f"demo: {error}")
        return 2
    return 0


def tell_story(out: Path, sizes: dict[str, str]) -> None:
    """Train the base, adapt it each way, and show the results."""
    began_s = time.perf_counter()
    print("1. A base learns English prose from random weights.")
    run_training(out, {**sizes, "RUN_NAME": "base"})
    print("2. From that base the model learns source code: full fine-tuning, and LoRA.")
    for variables in ADAPTATIONS:
        base = {"BASE_CHECKPOINT": str(out / "base")}
        run_training(out, {**sizes, **base, **variables})
    outcomes = [read_outcome(out / variables["RUN_NAME"]) for variables in ADAPTATIONS]
    show_table(outcomes)
    show_samples(outcomes)
    picture = out / "loss.png"
    curves = [(outcome.name, outcome.rows) for outcome in outcomes]
    draw_loss_curves(curves, picture, title="From prose to code: full fine-tuning and LoRA")
    print(f"The picture: {picture}. All in {time.perf_counter() - began_s:.0f} s.")


def run_training(out: Path, variables: dict[str, str]) -> None:
    """Run training.py in a subprocess; its output goes to a file, its progress is shown."""
    own = ("LORA_", "USE_LORA", "TEST_MODE")  # a user's own settings would change the story
    environment = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    environment |= {"OUTPUT_DIR": str(out), **variables}
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / "training.py")]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    atomic_write(out / f"{variables['RUN_NAME']}.log", done.stdout.encode())
    if done.returncode:
        name = variables["RUN_NAME"]
        raise TrainingError(f"The run {name} ended with code {done.returncode}: see above.")
    outcome = read_outcome(out / variables["RUN_NAME"])
    print(
        f"   {outcome.name}: validation loss {outcome.first_loss:.4f} -> {outcome.last_loss:.4f} "
        f"nats in {outcome.result.steps} steps; {outcome.stored_bytes / 1e3:,.0f} kB on disk"
    )


def read_outcome(folder: Path) -> Outcome:
    """Return what the run directory `folder` holds."""
    result, samples = read_result(folder), read_json(folder / "samples.json")
    assert result is not None
    return Outcome(folder.name, read_metrics(folder), result, samples)


def show_table(outcomes: list[Outcome]) -> None:
    """Print time, memory, trainable parameters, loss, and the share of full fine-tuning's gain."""
    from rich.console import Console
    from rich.table import Table

    full = outcomes[0]
    gained = full.first_loss - full.last_loss
    table = Table(title=f"Validation loss on code before: {full.first_loss:.3f} nats per character")
    table.add_column("run")
    for column in (
        "trainable",
        "on disk",
        "ms per step",
        "peak memory",
        "loss after",
        "of full's gain",
    ):
        table.add_column(column, justify="right")
    for outcome in outcomes:
        result = outcome.result
        table.add_row(
            outcome.name,
            f"{outcome.trained_fraction:.1%}",
            f"{outcome.stored_bytes / 1e3:,.0f} kB",
            f"{1000 * result.train_s / result.steps:.1f}",
            f"{result.peak_memory_bytes / 1e6:.0f} MB",
            f"{outcome.last_loss:.3f}",
            f"{(outcome.first_loss - outcome.last_loss) / gained:.1%}",
        )
    Console().print(table)


def show_samples(outcomes: list[Outcome]) -> None:
    """Print the text that the base and each adapted model generate after the same prompt."""
    print(f"--- the base writes ---\n{printable_answer(outcomes[0].samples['before'])}")
    for outcome in outcomes:
        print(f"--- {outcome.name} writes ---\n{printable_answer(outcome.samples['after'])}")


if __name__ == "__main__":
    sys.exit(main())
