"""`lora generate`: answer prompts in batches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lora.cli.flags.from_fields import GENERATION, Flat, config_from
from lora.cli.flags.shared import (
    Adapter,
    AnswerBase,
    Device,
    Devices,
    Implementation,
    Json,
    Model,
    SamplingFlags,
    System,
)
from lora.config import SamplingConfig
from lora.distributed.launch import Processes, processes_to_start
from lora.inference.loading import load_model
from lora.runs.typed_json import json_text
from lora.terminal import print_note, printable_answer, printable_json

Raw = Annotated[
    bool | None,
    Parameter(
        group=GENERATION,
        help="Continue the text as it is, without the chat template. Default: as in training.",
    ),
]


def generate(
    prompts: Annotated[list[str] | None, Parameter(group=GENERATION)] = None,
    *,
    model: Model = None,
    implementation: Implementation = "auto",
    adapter: Adapter = None,
    prompts_file: Annotated[Path | None, Parameter(group=GENERATION)] = None,
    system: System = None,
    raw: Raw = None,
    base_dtype: AnswerBase = "auto",
    device: Device = "auto",
    devices: Devices = None,
    json: Json = False,
    sampling: Annotated[SamplingFlags | None, Flat] = None,
) -> int | Processes:
    """Answer prompts, as many at a time as memory has room for.

    For example:

        lora generate "What is the capital of France?"
        lora generate --adapter runs/orders/adapter --prompts-file asks.txt --json
        lora generate --prompts-file asks.txt --devices 4

    Several devices share the prompts; the answers come in the prompts' order.
    On a terminal, control characters in answers are escaped; files and pipes get
    them as they are.

    Parameters
    ----------
    prompts
        Prompts to answer.
    prompts_file
        Text file with one prompt per line, answered after those on the command line.
    """
    config = config_from(SamplingConfig, sampling or SamplingFlags())
    from lora.data.prompting.ask import Asker
    from lora.distributed.start import joined
    from lora.errors import DataError
    from lora.inference.shared import generate_shared
    from lora.pretrained.positions import describe_excess
    from lora.runs.record import PromptFormat

    asked = [*(prompts or []), *_read_lines(prompts_file)]
    if not asked:
        raise DataError(
            "Cannot generate: no prompt is given. Write prompts after the command, or name a file "
            "with --prompts-file."
        )
    if processes := processes_to_start(devices, device):
        return processes
    if config.temperature == 0 and (config.top_k or config.top_p < 1):
        print_note(
            "note: --top-k and --top-p have no effect at --temperature 0, which is greedy "
            "decoding. Add --temperature 0.7 to sample."
        )
    loaded = load_model(model, adapter, device, implementation, base_dtype)
    if loaded.note:
        print_note(f"note: {loaded.note}")
    if model is None:
        print_note(f"model: {loaded.source.description}")
    loaded.implementation.tell_unless_native(print_note)
    asker = Asker(loaded.prompts or PromptFormat(), raw, system)
    if asker.describe():
        print_note(asker.describe())
    made = [asker.prompt(text, loaded.tokenizer) for text in asked]
    ids = [prompt.ids for prompt in made]
    n_tokens = max(map(len, ids)) + config.max_new_tokens
    excess = describe_excess(n_tokens, loaded.model.config.max_position_embeddings)
    if excess:
        print_note(f"note: with its answer {excess}")
    stop_ids = loaded.tokenizer.stop_ids
    with joined(loaded.choice.device) as world:
        if world.size > len(ids):
            print_note(
                f"note: {world.size - len(ids)} of {world.size} processes have nothing to answer: "
                f"the number of prompts is {len(ids)}"
            )
        answers = generate_shared(loaded.model, ids, config, world, stop_ids=stop_ids)
    written = [loaded.tokenizer.decode(tokens) for tokens in answers]
    _print(asked, written, json)
    return 0


def _print(asked: list[str], written: list[str], json: bool) -> None:
    if json:
        for prompt, answer in zip(asked, written, strict=True):
            row = {"prompt": prompt, "answer": answer}
            print(printable_json(json_text(row, ensure_ascii=False)))
    elif len(asked) == 1:
        print(printable_answer(written[0]))
    else:
        shown = "\n".join(f"> {p}\n{a}\n" for p, a in zip(asked, written, strict=True))
        print(printable_answer(shown))


def _read_lines(path: Path | None) -> list[str]:
    from lora.errors import DataError

    if path is None:
        return []
    try:
        # Line ends of any system, and no others: str.splitlines would cut at form feeds too.
        with path.open(encoding="utf-8-sig") as file:
            return [line.rstrip("\n") for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"Cannot read prompts from {path}: {error}. Name a UTF-8 text file."
        ) from None
