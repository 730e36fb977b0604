"""How a model was prompted in training: found in its examples, and kept beside its adapter.

The file `prompt_format.json` stands in the directory of an adapter or of a whole model; PEFT and
transformers ignore it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lora.data.prompting.rules import ReadingRules
from lora.data.reading.formats import LABELLED, TEMPLATE, Example
from lora.errors import DataError, gather
from lora.runs.disk import atomic_write, disk_error, read_json
from lora.runs.record import PromptFormat
from lora.runs.typed_json import Faults, parse, to_json

PROMPT_FORMAT_FILE = "prompt_format.json"
FORMAT_VERSION = 1


def describe_prompts(examples: Sequence[Example], rules: ReadingRules) -> PromptFormat:
    """Return how a model that is trained on `examples` is prompted."""
    chats = [example for example in examples if example.messages is not None]
    systems = {_system_of(example) for example in chats}
    formats = {example.format for example in examples}
    template = rules.template if formats == {TEMPLATE} else None
    if formats == {LABELLED}:
        template = rules.label_template
    return PromptFormat(
        style="chat" if chats else "raw",
        completions="turns" if rules.as_turns else "raw",
        system=next(iter(systems)) if len(systems) == 1 else None,
        template=None if template is None else template.source,
        label_template=None if rules.label_template is None else rules.label_template.source,
        labels=rules.labels,
    )


def save_prompt_format(prompts: PromptFormat, folder: Path) -> None:
    """Write the file into `folder`. Raises CheckpointError if the disk refuses."""
    content = {"format_version": FORMAT_VERSION, **to_json(prompts)}
    path = folder / PROMPT_FORMAT_FILE
    try:
        atomic_write(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise disk_error(path, error) from error


def read_prompt_format(folder: Path) -> PromptFormat | None:
    """Return what the file in `folder` says; None if there is none.

    Raises DataError for a file that is damaged or of a newer version.
    """
    path = folder / PROMPT_FORMAT_FILE
    if not path.is_file():
        return None
    values = read_json(path)
    faults: Faults = []
    prompts = parse(PromptFormat, values, str(path), faults)
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        faults.append(f"{path} has format_version={version!r}, not {FORMAT_VERSION}")
    if prompts is None or faults:
        advice = "Copy the adapter again, or remove the file: prompts are then chats as given."
        raise DataError(gather(faults, "Cannot tell how the model was prompted:", advice))
    return prompts


def _system_of(example: Example) -> str | None:
    first = (example.messages or ({},))[0]
    return str(first["content"]) if first.get("role") == "system" else None
