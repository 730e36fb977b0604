"""A comparison in the terminal: a table of its members, ratios, and answers side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lora.runs.comparison_record import METHOD_NAMES, Comparison, Member, Ratios, lora_ratios

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SHOWN_SAMPLES, SHOWN_CHARACTERS = 2, 240
RATE_SOURCES = {"sweep": "best of {n} tried", "default": "default", "given": "given"}


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the table of members, the ratios, the notes and a few answers."""
    console.print(members_table(comparison))
    for ratios in lora_ratios(comparison):
        console.print(describe_ratios(ratios), markup=False)
    for note in comparison.notes:
        console.print(f"note: {note}", markup=False)
    for number in range(min(SHOWN_SAMPLES, len(comparison.members[0].samples))):
        console.print()
        _print_sample(comparison, number, console)


def members_table(comparison: Comparison) -> Table:
    """Return a table with a column for each member."""
    from rich.table import Table

    same = {"steps": "the same steps", "time": "the same time"}[comparison.same]
    table = Table(title=f"{comparison.base}: {same}, data and order", title_justify="left")
    table.add_column("")
    for member in comparison.members:
        table.add_column(METHOD_NAMES[member.method], justify="right")
    metric = comparison.members[0].task_metric
    for name, cell_of in _ROWS:
        cells = [cell_of(member) for member in comparison.members]
        if any(cells):
            label = metric.name if metric is not None and cell_of is _metric else name
            table.add_row(label, *(cell or "–" for cell in cells))
    if comparison.base_eval_loss is not None:
        table.caption = f"validation loss of the base: {comparison.base_eval_loss:.4f}"
        table.caption_justify = "left"
    return table


def describe_ratios(ratios: Ratios) -> str:
    """Return LoRA against another member in one line, with the ratios that are known."""
    other = {"full": "full fine-tuning", "peft": "PEFT"}.get(ratios.against, ratios.against)
    parts = []
    if ratios.step_speed is not None:
        parts.append(f"{ratios.step_speed:.2f} times as fast per step")
    if (saved := ratios.memory_saved) is not None:
        parts.append(f"{abs(saved):.0%} {'less' if saved >= 0 else 'more'} peak memory")
    if ratios.stored_fraction is not None:
        parts.append(f"{ratios.stored_fraction:.1%} of its bytes on disk")
    if (difference := ratios.loss_difference) is not None:
        side = "lower" if difference < 0 else "higher"
        parts.append(f"validation loss {abs(difference):.4f} {side}")
    return f"LoRA against {other}: {', '.join(parts)}"


def _rate(member: Member) -> str:
    chosen = RATE_SOURCES[member.rate_chosen].format(n=len(member.rates_tried))
    return f"{member.learning_rate:g} ({chosen})"


def _trainable(member: Member) -> str:
    fraction = member.trainable_parameters / max(1, member.total_parameters)
    return f"{member.trainable_parameters:,} ({fraction:.2%})"


def _peak(member: Member) -> str:
    return _gigabytes(member.peak_memory_bytes)


def _planned(member: Member) -> str:
    planned = member.planned_memory_bytes
    return "" if planned is None else _gigabytes(planned)


def _gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"


def _saved(member: Member) -> str:
    if member.saved_step is None:
        return ""
    return "the last step" if member.saved_step == member.steps else f"step {member.saved_step:,}"


def _forgetting(member: Member) -> str:
    loss = member.forgetting
    return "" if loss is None else f"{loss.before:.3f} → {loss.after:.3f}"


def _metric(member: Member) -> str:
    score = member.task_metric
    return "" if score is None else f"{score.before:.1%} → {score.after:.1%}"


_ROWS: tuple[tuple[str, Callable[[Member], str]], ...] = (
    ("frozen base", lambda m: m.base_dtype or ""),
    ("learning rate", _rate),
    ("steps", lambda m: f"{m.steps:,}"),
    ("time per step", lambda m: f"{1000 * m.step_s_median:,.1f} ms"),
    ("time in all steps", lambda m: f"{m.train_s:,.1f} s"),
    ("peak memory", _peak),
    ("planned memory", _planned),
    ("trainable parameters", _trainable),
    ("on disk", lambda m: f"{m.stored_bytes / 1e6:,.2f} MB"),
    ("validation loss at the end", lambda m: f"{m.final_eval_loss:.4f}"),
    ("best validation loss", lambda m: f"{m.best_eval_loss:.4f}"),
    ("saved and evaluated", _saved),
    ("loss on another text", _forgetting),
    ("task", _metric),
)


def _print_sample(comparison: Comparison, number: int, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    first = comparison.members[0].samples[number]
    answers = [(METHOD_NAMES[m.method], m.samples[number].answer) for m in comparison.members]
    if number < len(comparison.base_samples):
        answers.insert(0, ("base", comparison.base_samples[number].answer))
    if first.expected is not None:
        answers.insert(0, ("expected", first.expected))
    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text("prompt", "bold"), Text(_short(first.prompt), "bold"))
    for name, answer in answers:
        grid.add_row(Text(name, "dim"), Text(_short(answer)))
    console.print(grid)


def _short(text: str) -> str:
    flat = " ".join(text.split())
    shown = flat if len(flat) <= SHOWN_CHARACTERS else f"{flat[:SHOWN_CHARACTERS]} …"
    return "".join(character if character.isprintable() else "�" for character in shown)
