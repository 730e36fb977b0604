"""LoRA against full fine-tuning, each at its best learning rate; which rank, which learning rate.

    PYTHONPATH=. python benchmarks/findings.py orders rates --device cuda    # a few minutes
    PYTHONPATH=. python benchmarks/findings.py code shakespeare ranks        # an hour on two cores
    PYTHONPATH=. python benchmarks/findings.py code --smoke                  # to see that it runs

orders       SmolLM2-135M-Instruct on demo.py's order notes, three seeds
code         the character GPT from prose to code: three seeds
shakespeare  the same, from prose to the plays in the folder that LORA_BENCH_DATA names
ranks        ranks 4, 8, 16 and 32, each at its best learning rate, on the order notes and on code
rates        a grid of learning rates for LoRA and full fine-tuning on the order notes
methods      LoRA, full fine-tuning and PEFT on the order notes: time per step, peak memory

Learning rates are chosen on one seed by validation loss, with as many trials for either method.
Prints JSON lines, and writes into --out: QUESTION.jsonl, QUESTION.svg and .png, and all runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from findings_pictures import draw_methods, draw_ranks, draw_rates, draw_sides

from lora.compare import compare
from lora.compare.config import CompareConfig, LearningRates
from lora.compare.decoder_job import EvaluationConfig
from lora.compare.decoder_target import DecoderTarget
from lora.compare.factory import FactoryTarget
from lora.compare.results import best_learning_rate
from lora.compare.target import MemberTask, run_rate_trials, short_run
from lora.config import DataConfig, RunConfig, TrainConfig
from lora.data.reading.orders import make_orders
from lora.runs.comparison_record import Comparison, lora_ratios
from lora.runs.progress import NoProgress
from lora.sweep import SweepJob, sweep
from lora.sweep.grid import Grid
from models.char_compare import CharFactory
from models.classic_settings import AUTO, TEST_SIZES, ClassicSettings

DATA = DataConfig(max_length=192, packing=False)
ORDERS_ROWS, VALIDATION_NOTES, TEST_NOTES = 4, 60, 40
RANKS, SEEDS = (4, 8, 16, 32), (0, 1, 2)
GRID_LORA = (2e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2)
GRID_FULL = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3)
ORDERS_LORA, ORDERS_FULL = (5e-4, 1e-3, 2e-3, 3e-3, 5e-3), (5e-5, 1e-4, 2e-4, 3e-4, 5e-4)
CHAR_LORA, CHAR_FULL = (2.5e-3, 3.5e-3, 5e-3, 7e-3, 1e-2), (5e-4, 1e-3, 2e-3, 3e-3, 4e-3)
RANK_RATES, CHAR_RANK_RATES = (1e-3, 2e-3, 4e-3), (2.5e-3, 5e-3, 1e-2)
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How long to train, on how much data, how many trials."""

    orders_steps: int = 150
    char_steps: int = 600
    base_steps: int = 1500
    notes: int = VALIDATION_NOTES
    answers: int = TEST_NOTES
    seeds: tuple[int, ...] = SEEDS
    max_rates: int = 99
    ranks: tuple[int, ...] = RANKS
    is_smoke: bool = False


SMOKE = Sizes(3, 20, 60, 4, 2, (0, 1), 2, (4, 8), is_smoke=True)


@dataclass(frozen=True)
class Task:
    """One question, and where and how its runs are made."""

    name: str
    out: Path
    device: str
    model: str | None
    sizes: Sizes

    def rates(self, all_of_them: tuple[float, ...]) -> tuple[float, ...]:
        """Return the learning rates to try: the middle ones if their number is limited."""
        limit = self.sizes.max_rates
        first = max(0, (len(all_of_them) - limit) // 2)
        return all_of_them[first : first + limit]

    def run(self, name: str) -> RunConfig:
        """Return the settings of a run in this task's folder."""
        return RunConfig(
            out=self.out / self.name, name=name, device=self.device, samples=2, sample_tokens=60
        )


def main() -> int:
    """Answer the named questions; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("questions", nargs="+", choices=sorted(QUESTIONS))
    parser.add_argument("--out", type=Path, default=Path("runs") / "findings")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda …")
    parser.add_argument("--model", help="as in lora finetune; left out, SmolLM2-135M-Instruct")
    parser.add_argument("--smoke", action="store_true", help="few steps, to see that it runs")
    parser.add_argument("--steps", type=int, help="steps of each run on the order notes")
    parser.add_argument("--char-steps", type=int, help="steps of each run of the character GPT")
    arguments = parser.parse_args()
    sizes = SMOKE if arguments.smoke else Sizes()
    sizes = replace(sizes, orders_steps=arguments.steps or sizes.orders_steps)
    sizes = replace(sizes, char_steps=arguments.char_steps or sizes.char_steps)
    for name in arguments.questions:
        task = Task(name, arguments.out, arguments.device, arguments.model, sizes)
        ask(task)
    return 0


def ask(task: Task) -> None:
    """Print, save and plot the rows of `task`."""
    question, draw = QUESTIONS[task.name]
    task.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    out = sys.stdout
    path = task.out / f"{task.name}.jsonl"
    with path.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(sys.stderr):
        for found in question(task):
            row = {"question": task.name, **found}
            rows.append(row)
            line = json.dumps(row)
            print(line, file=out, flush=True)
            print(line, file=file, flush=True)
    if not any("skipped" in row for row in rows):
        draw(rows, task.out / task.name)


# ---- LoRA at its best against full fine-tuning at its best


def ask_orders(task: Task) -> Iterator[Row]:
    """SmolLM2 on the order notes, scored on the test part, which no choice depends on."""

    def target(seed: int) -> DecoderTarget:
        return orders_target(task, seed)

    train = orders_train(task.sizes.orders_steps)
    yield from both_sides(task, target, train, (ORDERS_LORA, ORDERS_FULL))


def ask_code(task: Task) -> Iterator[Row]:
    """The character GPT from prose to the source of Python's library."""
    yield from char_sides(task, "")


def ask_shakespeare(task: Task) -> Iterator[Row]:
    """The character GPT from prose to Shakespeare's plays."""
    folder = os.environ.get("LORA_BENCH_DATA")
    text = Path(folder or ".") / "tiny_shakespeare.txt"
    if not folder or not text.is_file():
        yield {"skipped": "LORA_BENCH_DATA names no folder with tiny_shakespeare.txt"}
        return
    yield from char_sides(task, str(text))


def char_sides(task: Task, data_path: str) -> Iterator[Row]:
    """LoRA and full fine-tuning of the character GPT on one text."""
    settings, base = char_base(task, data_path)

    def target(seed: int) -> FactoryTarget:
        return FactoryTarget(CharFactory(replace(settings, seed=seed), base))

    yield from both_sides(task, target, char_train(settings), (CHAR_LORA, CHAR_FULL))


def both_sides(
    task: Task,
    target: Callable[[int], Any],
    train: TrainConfig,
    trial_rates: tuple[tuple[float, ...], tuple[float, ...]],
) -> Iterator[Row]:
    """Choose each method's learning rate on the first seed, then train both with every seed."""
    first, *others = task.sizes.seeds
    rates = LearningRates(
        task.rates(trial_rates[0]), task.rates(trial_rates[1]), rate_steps=train.steps
    )
    config = CompareConfig(
        train=replace(train, seed=first), run=task.run(f"seed{first}"), rates=rates, isolated=False
    )
    found = compare(target(first), config).comparison
    for member in found.members:
        for trial in member.rates_tried:
            yield {"kind": "rate", "method": member.method, "seed": first, **asdict(trial)}
    yield from member_rows(found)
    lora, full = found.members
    for seed in others:
        config = CompareConfig(
            train=replace(train, seed=seed, learning_rate=lora.learning_rate),
            run=task.run(f"seed{seed}"),
            rates=LearningRates(full_learning_rate=full.learning_rate),
            isolated=False,
        )
        yield from member_rows(compare(target(seed), config).comparison)


def member_rows(found: Comparison) -> Iterator[Row]:
    """Yield a row for each member of a comparison."""
    for member in found.members:
        fields = asdict(member)
        for name in ("samples", "rates_tried", "folder", "name", "rate_chosen"):
            del fields[name]
        yield {
            "kind": "member",
            "base": found.base,
            "device": found.device,
            "seed": found.seed,
            "eval_loss_before": found.base_eval_loss,
            **fields,
        }


def ask_methods(task: Task) -> Iterator[Row]:
    """LoRA, full fine-tuning and PEFT, each in its own process: time and memory."""
    found = compare(
        orders_target(task, 0),
        CompareConfig(
            train=replace(orders_train(task.sizes.orders_steps), learning_rate=2e-3),
            run=task.run("run"),
            rates=LearningRates(full_learning_rate=2e-4),
            methods=("lora", "full", "peft"),
        ),
    ).comparison
    yield from member_rows(found)
    for one in lora_ratios(found):
        yield {"kind": "ratios", **asdict(one)}


# ---- which rank


def ask_ranks(task: Task) -> Iterator[Row]:
    """Each rank at the best of a few learning rates, on the order notes and on code."""
    sizes = task.sizes
    grid = Grid(
        rank=sizes.ranks, learning_rate=task.rates(RANK_RATES), alpha=("2r",), seed=sizes.seeds
    )
    for row in swept(task, "orders", grid):
        yield {"task": "orders", **row}
    settings, base = char_base(task, "")
    for rank in sizes.ranks:
        own = replace(settings, lora_rank=rank, lora_alpha=2.0 * rank)
        for row in char_rank(task, own, base):
            yield {"task": "code", "rank": rank, **row}


def char_rank(task: Task, settings: ClassicSettings, base: Path) -> Iterator[Row]:
    """Choose the rank's learning rate on the first seed, then train the other seeds with it."""
    first, *others = task.sizes.seeds
    train, rank = char_train(settings), settings.lora_rank
    trials = char_trials(task, settings, base, first, task.rates(CHAR_RANK_RATES), train)
    for one in trials:
        yield {"seed": first, **asdict(one)}
    best = best_learning_rate(trials)
    for seed in others if best is not None else ():
        own = replace(settings, lora_rank=rank)
        for one in char_trials(task, own, base, seed, (best,), train):
            yield {"seed": seed, **asdict(one)}


def char_trials(
    task: Task,
    settings: ClassicSettings,
    base: Path,
    seed: int,
    rates: tuple[float, ...],
    train: TrainConfig,
) -> list[Any]:
    """Return the validation loss of LoRA on the character GPT at each learning rate."""
    target = FactoryTarget(CharFactory(replace(settings, seed=seed), base))
    run = task.run("x")
    run = replace(run, out=run.out / f"code-rank{settings.lora_rank}-seed{seed}")
    member = MemberTask("lora", replace(train, seed=seed), run)
    return run_rate_trials(target.run_member, member, rates, NoProgress())


# ---- which rate


def ask_rates(task: Task) -> Iterator[Row]:
    """A grid of learning rates for both methods on the order notes."""
    sizes = task.sizes
    grid = Grid(rank=(8,), learning_rate=task.rates(GRID_LORA), seed=sizes.seeds)
    for row in swept(task, "lora", grid):
        yield {"method": "lora", **row}
    train = orders_train(sizes.orders_steps)
    for seed in sizes.seeds:
        run = task.run("x")
        run = replace(run, out=run.out / f"full-seed{seed}")
        target, member = orders_target(task, 0), MemberTask("full", replace(train, seed=seed), run)
        rates = task.rates(GRID_FULL)
        for trial in run_rate_trials(target.run_member, member, rates, NoProgress()):
            yield {"method": "full", "rank": None, "seed": seed, **asdict(trial)}


# ---- what the questions share


def orders_train(steps: int) -> TrainConfig:
    """Return the training settings for the order notes: one epoch."""
    return TrainConfig(steps=steps, batch_size=ORDERS_ROWS)


def orders_target(task: Task, seed: int) -> DecoderTarget:
    """Return SmolLM2 and its data: validation notes for choices, test notes for scores."""
    sizes = task.sizes
    evaluation = EvaluationConfig(
        metric="json-fields",
        test_data=make_orders("test", sizes.answers),
        answers=sizes.answers,
        answer_tokens=60,
    )
    return DecoderTarget(
        data=make_orders("train", sizes.orders_steps * ORDERS_ROWS, seed),
        model=task.model,
        eval_data=make_orders("validation", sizes.notes),
        data_config=DATA,
        evaluation=evaluation,
    )


def swept(task: Task, name: str, grid: Grid) -> Iterator[Row]:
    """Yield the validation loss of each candidate of one sweep on the order notes."""
    target, train = orders_target(task, 0), orders_train(task.sizes.orders_steps)
    job = SweepJob(
        data=target.data,
        grid=grid,
        model=task.model,
        eval_data=target.eval_data,
        train=train,
        data_config=DATA,
        run=short_run(task.run(name), name, train.steps),
    )
    for candidate in sweep(job).candidates:
        chosen = {key: candidate.settings[key] for key in ("rank", "learning_rate", "seed")}
        yield {**chosen, "eval_loss": candidate.eval_loss if candidate.status == "done" else None}


def char_base(task: Task, data_path: str) -> tuple[ClassicSettings, Path]:
    """Return the settings of the character GPT, and its base, trained on prose from scratch."""
    from lora.device import choose_device
    from training import find_base

    sizes = task.sizes
    small = {k: v for k, v in TEST_SIZES.items() if sizes.is_smoke and not k.endswith("steps")}
    settings = ClassicSettings(
        use_lora=True,
        data_path=data_path,
        base_checkpoint=AUTO,
        output_dir=str(task.out / task.name),
        base_steps=sizes.base_steps,
        max_steps=sizes.char_steps,
        device=task.device,
        **small,
    )
    return settings, find_base(settings, choose_device(task.device, settings.precision))


def char_train(settings: ClassicSettings) -> TrainConfig:
    """Return the training settings of both methods; each run adds its learning rate."""
    return replace(settings.train_config(), learning_rate=None)


QUESTIONS: dict[str, tuple[Callable[[Task], Iterator[Row]], Callable[[list[Row], Path], None]]] = {
    "orders": (ask_orders, draw_sides),
    "code": (ask_code, draw_sides),
    "shakespeare": (ask_shakespeare, draw_sides),
    "ranks": (ask_ranks, draw_ranks),
    "rates": (ask_rates, draw_rates),
    "methods": (ask_methods, draw_methods),
}


if __name__ == "__main__":
    sys.exit(main())
