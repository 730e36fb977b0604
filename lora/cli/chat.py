"""`lora chat`: talk to a model; adapters can be switched while talking."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lora.config import SamplingConfig
from lora.inference.loading import LoadedModel, load_model, load_tokenizer_of

if TYPE_CHECKING:
    from lora.data.reading.messages import Message

TALKATIVE = SamplingConfig(max_new_tokens=512, temperature=0.7, top_p=0.95)
HELP = "/adapter FOLDER (or none) switches, /new forgets what was said, /quit ends"


def chat(
    *,
    model: str | None = None,
    adapter: Path | None = None,
    system: str | None = None,
    device: str = "auto",
    sampling: Annotated[SamplingConfig, Parameter(name="*")] = TALKATIVE,
) -> int:
    """Talk to a model, the answer appearing as it is written.

    Examples:

        lora chat --adapter runs/orders/adapter

    /adapter FOLDER switches to another adapter, /adapter none to the base, /new forgets what was
    said, /quit (or the end of the input) ends.

    Parameters
    ----------
    model
        As in lora finetune; left out, SmolLM2-135M-Instruct.
    adapter
        An adapter's folder.
    system
        What the system says first.
    device
        auto, cpu, cuda …
    """
    loaded = load_model(model, adapter, device)
    first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    said = list(first)
    print(f"{loaded.source.name}; {HELP}", file=sys.stderr)
    while True:
        line = _ask()
        if line is None or line == "/quit":
            return 0
        if line.startswith("/"):
            loaded, begins_anew = _obey(line, loaded)
            said = list(first) if begins_anew else said
            continue
        if line:
            drawn = replace(sampling, seed=sampling.seed + len(said))  # or answers would repeat
            said.append({"role": "user", "content": line})
            said.append({"role": "assistant", "content": _answer(loaded, said, drawn)})


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _obey(line: str, loaded: LoadedModel) -> tuple[LoadedModel, bool]:
    """Do what a line with a slash says; return the model, and whether all begins anew."""
    from lora.adapters.apply import lora_layers, remove_lora
    from lora.adapters.save_load import load_adapter
    from lora.errors import LoraError

    command, _, name = line.partition(" ")
    if command == "/new":
        return loaded, True
    if command != "/adapter" or not name:
        print(f"unknown: {line}. {HELP}", file=sys.stderr)
        return loaded, False
    try:
        folder = None if name == "none" else Path(name.strip()).expanduser()
        if folder is not None:
            from lora.adapters.save_load import read_adapter_config

            read_adapter_config(folder)  # what is wrong with it is known before the old one goes
        tokenizer = load_tokenizer_of(loaded.source, folder)
        if lora_layers(loaded.model):
            remove_lora(loaded.model)
        if folder is not None:
            load_adapter(loaded.model, folder)
    except LoraError as error:
        print(f"{error}", file=sys.stderr)
        return loaded, False
    print("the base" if folder is None else f"adapter: {folder}", file=sys.stderr)
    return replace(loaded, tokenizer=tokenizer), True


def _answer(loaded: LoadedModel, said: list[Message], sampling: SamplingConfig) -> str:
    from lora.data.chat.prompts import chat_prompt
    from lora.inference.generate import generate

    tokens: list[int] = []
    shown = ""

    def show(row: int, token: int) -> None:
        nonlocal shown
        tokens.append(token)
        text = loaded.tokenizer.decode(tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may take several tokens
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text

    prompt = chat_prompt(said, loaded.tokenizer)
    answer = generate(
        loaded.model, [prompt.ids], sampling, stop_ids=loaded.tokenizer.stop_ids, on_token=show
    )
    text = loaded.tokenizer.decode(answer[0])
    print(text[len(shown) :])
    return text
