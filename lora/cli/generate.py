"""`lora generate`: answers to prompts, many at a time."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lora.config import SamplingConfig
from lora.inference.loading import load_model


def generate(
    prompts: list[str] | None = None,
    *,
    model: str | None = None,
    adapter: Path | None = None,
    prompts_file: Path | None = None,
    system: str | None = None,
    raw: bool = False,
    device: str = "auto",
    json: bool = False,
    sampling: Annotated[SamplingConfig | None, Parameter(name="*")] = None,
) -> int:
    """Answer prompts; all of them share one batch.

    Examples:

        lora generate "What is the capital of France?"
        lora generate --adapter runs/orders/adapter --prompts-file asks.txt --json

    Parameters
    ----------
    prompts
        What to answer.
    model
        As in lora finetune; left out, SmolLM2-135M-Instruct.
    adapter
        An adapter's folder.
    prompts_file
        File with one prompt a line, after those given.
    system
        What the system says first.
    raw
        Go on with the text as it is, without the chat template.
    device
        auto, cpu, cuda …
    json
        Print one JSON object a line.
    """
    from lora.data.chat.prompts import chat_prompt, plain_prompt
    from lora.errors import DataError
    from lora.inference.generate import generate as answer

    asked = [*(prompts or []), *_read_lines(prompts_file)]
    if not asked:
        raise DataError("No prompt was given: name one, or a file with --prompts-file.")
    loaded = load_model(model, adapter, device)
    first = [{"role": "system", "content": system}] if system is not None else []
    made = [
        plain_prompt(text, loaded.tokenizer)
        if raw
        else chat_prompt([*first, {"role": "user", "content": text}], loaded.tokenizer)
        for text in asked
    ]
    ids = [prompt.ids for prompt in made]
    answers = answer(loaded.model, ids, sampling, stop_ids=loaded.tokenizer.stop_ids)
    written = [loaded.tokenizer.decode(tokens) for tokens in answers]
    _print(asked, written, json)
    return 0


def _print(asked: list[str], written: list[str], json: bool) -> None:
    if json:
        for prompt, answer in zip(asked, written, strict=True):
            print(json_format.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False))
    elif len(asked) == 1:
        print(written[0])
    else:
        print("\n".join(f"> {p}\n{a}\n" for p, a in zip(asked, written, strict=True)))


def _read_lines(path: Path | None) -> list[str]:
    from lora.errors import DataError

    if path is None:
        return []
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The prompts {path} cannot be read: {error}. Name a text file.") from None
