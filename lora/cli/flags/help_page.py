"""The layout of `--help`: groups of flags, one entry each, in two columns without boxes.

LoRA
  --rank INT            LoRA rank (PEFT's r), typically 8 to 64. [default: 8]
  --[no-]packing        Pack several examples into one sequence. [default: on]
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cyclopts.help import HelpEntry, HelpPanel
    from rich.console import Console, ConsoleOptions

MAX_LABEL_COLUMNS = 26
"""Longer flags have their text on the next line."""
MAX_HELP_COLUMNS = 120
_INDENT = 2
_GLUE = "\x1f"
"""A space at which no line is broken."""


class HelpPage:
    """What cyclopts calls for each group of flags of a help page."""

    def render_usage(self, console: Console, options: ConsoleOptions, usage: Any) -> None:
        """Print the usage line."""
        if usage:
            console.print(f"Usage: {str(usage).strip()}\n", highlight=False, markup=False)

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        """Print one group."""
        if not panel.entries:
            return
        rows = [(_label(entry), _text(entry)) for entry in panel.entries]
        fitting = [len(label) for label, _ in rows if len(label) <= MAX_LABEL_COLUMNS]
        width = max(fitting, default=MAX_LABEL_COLUMNS)
        n_columns = min(console.width, MAX_HELP_COLUMNS)
        console.print(str(panel.title), style="bold", highlight=False, markup=False)
        for label, text in rows:
            for line in _lines(label, text, width, n_columns):
                console.print(line, highlight=False, markup=False, soft_wrap=True)
        console.print()


def _lines(label: str, text: str, width: int, n_columns: int) -> list[str]:
    left = " " * (_INDENT + width + 2)
    wrapper = textwrap.TextWrapper(
        n_columns, initial_indent=left, subsequent_indent=left, break_on_hyphens=False
    )
    lines = [line.replace(_GLUE, " ") for line in wrapper.wrap(text)]
    head = " " * _INDENT + label
    if len(label) > width or not lines:
        return [head, *lines]
    return [head.ljust(len(left)) + lines[0][len(left) :], *lines[1:]]


def _label(entry: HelpEntry) -> str:
    """Return a flag with its value; `--[no-]x` for a flag that can be switched off."""
    if entry.positional_label:
        return ", ".join([entry.positional_label, *entry.positive_names[:1]])
    names = [*entry.positive_names, *entry.positive_shorts]
    first = names[0] if names else ""
    if f"--no-{first[2:]}" in entry.negative_names:
        first = f"--[no-]{first[2:]}"
    value = _value(entry.metavar) if entry.metavar else ""
    shorts = "".join(f", {short}" for short in entry.positive_shorts)
    return f"{first}{shorts}{value}"


def _value(metavar: str) -> str:
    """Return a flag's value: ` INT`, or ` INT,...` for a flag that takes several."""
    kinds = metavar.removesuffix("...").split("|")
    return f" {kinds[0].removesuffix('...')}{',...' if metavar.endswith('...') else ''}"


def _text(entry: HelpEntry) -> str:
    """Return a flag's text with its choices and its default."""
    facts = ["|".join(entry.choices or ())]
    facts.append("" if entry.default is None else f"default:{_GLUE}{entry.default}")
    facts.append("required" if entry.required else "")
    known = f",{_GLUE}".join(fact for fact in facts if fact)
    text = str(entry.description.primary_renderable)
    return f"{text} [{known}]" if known else text
