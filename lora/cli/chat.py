"""`lora chat`: chat with a model; adapters can be switched at any time."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from lora.cli.flags.from_fields import Flat, config_from, flags_from
from lora.cli.flags.shared import Adapter, AnswerBase, Device, Implementation, Model, System
from lora.config import MAX_SEED, SamplingConfig
from lora.inference.checkpoints.find import find_adapter
from lora.inference.loading import LoadedModel, load_model, load_tokenizer_of
from lora.inference.run_settings import find_prompt_format
from lora.terminal import print_note, printable_answer

if TYPE_CHECKING:
    from lora.data.chat.prompts import Prompt
    from lora.data.prompting.ask import Asker
    from lora.data.reading.messages import Message
    from lora.data.tokenizers.subword import TextTokenizer

HELP = "/adapter DIRECTORY (or none) switches, /new clears the conversation, /quit exits"


@flags_from(SamplingConfig)
class ChatSampling:
    """Generation in a conversation: sampled, and longer than an answer of lora generate."""

    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.95


def chat(
    *,
    model: Model = None,
    implementation: Implementation = "auto",
    adapter: Adapter = None,
    system: System = None,
    base_dtype: AnswerBase = "auto",
    device: Device = "auto",
    sampling: Annotated[ChatSampling | None, Flat] = None,
) -> int:
    """Chat with a model in the terminal.

    For example:

        lora chat --adapter runs/orders/adapter

    In the chat, /adapter DIRECTORY switches to another adapter, /adapter none to
    the base model, /new clears the conversation, /quit (or end of input) exits.
    """
    config = config_from(SamplingConfig, sampling or ChatSampling())
    loaded = load_model(model, adapter, device, implementation, base_dtype)
    if loaded.note:
        print_note(f"note: {loaded.note}")
    loaded.implementation.tell_unless_native(print_note)
    asker = _asker(loaded, system)
    said: list[Message] = []
    is_beyond = False
    print_note(f"{loaded.source.description}; {HELP}")
    while True:
        line = _ask()
        if line is None or line == "/quit":
            return 0
        if line.startswith("/"):
            loaded, asker, is_new = _run_command(line, loaded, asker)
            said, is_beyond = ([], False) if is_new else (said, is_beyond)
            continue
        if line:
            # Its own seed, or the same question would always get the same answer.
            n_said = len(said) + (asker.system_prompt is not None)
            own = replace(config, seed=(config.seed + n_said) % (MAX_SEED + 1))
            said.append({"role": "user", "content": line})
            prompt = asker.prompt_after(said, loaded.tokenizer)
            excess = _describe_excess(loaded, prompt, own)
            if excess and not is_beyond:  # said once: every later question is beyond them too
                print_note(f"note: with its answer {excess}, or begin again with /new")
            is_beyond = excess is not None
            said.append({"role": "assistant", "content": _answer(loaded, prompt, own)})


def _asker(loaded: LoadedModel, system: str | None) -> Asker:
    """Return what asks as in training, and say what that is."""
    from lora.data.prompting.ask import Asker
    from lora.runs.record import PromptFormat

    asker = Asker(loaded.prompts or PromptFormat(), system=system)
    if asker.describe():
        print_note(asker.describe())
    if not asker.takes_turns:
        print_note("every line is asked by itself, without the earlier ones")
    return asker


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _run_command(line: str, loaded: LoadedModel, asker: Asker) -> tuple[LoadedModel, Asker, bool]:
    """Run a line that starts with a slash.

    Returns the model, what asks it, and whether to clear the chat.
    """
    from lora.errors import LoraError

    command, _, name = line.partition(" ")
    if command == "/new":
        return loaded, asker, True
    if command != "/adapter" or not name:
        print_note(f"Unknown command {line!r}: {HELP}")
        return loaded, asker, False
    try:
        folder = None if name.strip() == "none" else find_adapter(_expanded(name.strip()))
        prompts = find_prompt_format(folder, loaded.source.folder)
        new_asker = _asker(replace(loaded, prompts=prompts), asker.system)
        tokenizer = _switch(loaded, folder)
    except (LoraError, OSError) as error:
        print_note(f"{error}\nNothing was switched.")
        return loaded, asker, False
    print_note("base model" if folder is None else f"adapter: {folder}")
    return replace(loaded, tokenizer=tokenizer, prompts=prompts), new_asker, True


def _expanded(name: str) -> Path:
    from lora.errors import AdapterError

    try:
        return Path(name).expanduser()
    except RuntimeError:  # no such user, or no home directory
        raise AdapterError(
            f"Cannot load the adapter {name}: the home directory that ~ stands for is not known. "
            "Write the whole path."
        ) from None


def _switch(loaded: LoadedModel, folder: Path | None) -> TextTokenizer:
    """Changes the model in place: the adapter in `folder` instead of its own, or none.

    Returns the tokenizer to ask it with. A fault leaves the model as it was.
    """
    from lora.adapters.apply import lora_layers, remove_lora
    from lora.adapters.save_load import load_adapter, read_adapter_config, save_adapter

    if folder is not None:
        read_adapter_config(folder)
    tokenizer = load_tokenizer_of(loaded.source, folder)
    has_former = bool(lora_layers(loaded.model))
    with tempfile.TemporaryDirectory() as kept:  # as it is in the model: its files may have changed
        former = Path(kept, "adapter")
        if has_former:
            save_adapter(loaded.model, former)
            remove_lora(loaded.model)
        is_switched = False
        try:
            if folder is not None:
                load_adapter(loaded.model, folder)
            is_switched = True
        finally:  # also when memory runs out, or the disk fails
            if has_former and not is_switched:
                load_adapter(loaded.model, former)
    return tokenizer


def _describe_excess(loaded: LoadedModel, prompt: Prompt, sampling: SamplingConfig) -> str | None:
    from lora.pretrained.positions import describe_excess

    n_tokens = len(prompt.ids) + sampling.max_new_tokens
    return describe_excess(n_tokens, loaded.model.config.max_position_embeddings)


def _answer(loaded: LoadedModel, prompt: Prompt, sampling: SamplingConfig) -> str:
    from lora.inference.generate import generate

    tokens: list[int] = []
    shown = ""

    def show(row: int, token: int) -> None:
        nonlocal shown
        tokens.append(token)
        text = loaded.tokenizer.decode(tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may take several tokens
            sys.stdout.write(printable_answer(text[len(shown) :]))
            sys.stdout.flush()
            shown = text

    answer = generate(
        loaded.model, [prompt.ids], sampling, stop_ids=loaded.tokenizer.stop_ids, on_token=show
    )
    text = loaded.tokenizer.decode(answer[0])
    print(printable_answer(text[len(shown) :]))
    return text
