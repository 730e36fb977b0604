"""The commands that a user runs next on what training has saved, with their real paths."""

from __future__ import annotations

import shlex
from pathlib import Path

PROMPT = "Your prompt"


def next_commands(
    saved: Path, model: str | None, program: str = "lora", *, has_gguf: bool = True
) -> list[str]:
    """Return the commands that ask, merge and export what a run saved, quoted for a shell.

    Args:
        saved: directory of the adapter, or of the whole model after full fine-tuning.
        model: the base as the user named it; None: the adapter names it, or it is the default one.
        program: how the command line is called here, already quoted.
        has_gguf: whether the model can be written as a GGUF file.
    """
    run = saved.parent
    gguf = run / f"{run.name}.gguf"
    if saved.name == "model":
        given = ["--model", _path(saved)]
        calls = [["generate", PROMPT, *given], ["export", _path(gguf), *given], ["chat", *given]]
    else:
        base = [] if model is None else ["--model", _path(model)]
        given = ["--adapter", _path(saved), *base]
        merge = ["merge", _path(saved), _path(run / "merged"), *base]
        calls = [["generate", PROMPT, *given], merge, ["export", _path(gguf), *given]]
    kept = [words for words in calls if has_gguf or words[0] != "export"]
    return [f"{program} {shlex.join(words)}" for words in kept]


def _path(path: Path | str) -> str:
    """Return a path as a word that is no flag."""
    text = str(path)
    return f"./{text}" if text.startswith("-") else text
