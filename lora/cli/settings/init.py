"""`lora init`: a commented settings file for `lora finetune`, with every default."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.argument import Argument

from lora.cli.finetune import FromAdapter, Full
from lora.cli.flags.from_fields import DATA, GROUPS, OUTPUT, Flat, changed_by, flags_from
from lora.cli.flags.shared import (
    Deterministic,
    Implementation,
    Model,
    Overwrite,
    Report,
    ValidationData,
)
from lora.config import (
    DEFAULT_EPOCHS,
    BaseWeights,
    DataConfig,
    LoRAConfig,
    MemoryConfig,
    RunConfig,
    TrainConfig,
)
from lora.errors import ConfigError
from lora.runs.outputs import OutputPath
from lora.terminal import print_line, print_note

NOT_IN_FILE = ("resume", "json")
"""Flags of lora finetune that are of one call."""
ANSWERS = {"y": True, "yes": True, "n": False, "no": False}

Data = Annotated[Path | None, Parameter(group=DATA, help="Training examples, as in lora finetune.")]


@flags_from(LoRAConfig, unset=True)
class InitLoRA:
    """The adapter."""


@flags_from(TrainConfig, unset=True)
class InitTrain:
    """Optimization."""


@flags_from(DataConfig, unset=True)
class InitData:
    """Reading, tokenizing and packing of the examples."""


@flags_from(RunConfig, unset=True)
class InitRun:
    """Evaluation, checkpoints, run directory and device."""


@flags_from(MemoryConfig, unset=True)
class InitMemory:
    """GPU memory."""


@flags_from(BaseWeights, unset=True)
class InitBase:
    """How the frozen linears are stored."""


def init(
    file: Annotated[Path, Parameter(group=OUTPUT)] = Path("run.yaml"),
    *,
    data: Data = None,
    model: Model = None,
    implementation: Implementation = "auto",
    eval_data: ValidationData = None,
    full: Full = False,
    from_adapter: FromAdapter = None,
    deterministic: Deterministic = False,
    report: Report = True,
    overwrite: Overwrite = False,
    lora: Annotated[InitLoRA | None, Flat] = None,
    train: Annotated[InitTrain | None, Flat] = None,
    data_config: Annotated[InitData | None, Flat] = None,
    run: Annotated[InitRun | None, Flat] = None,
    memory: Annotated[InitMemory | None, Flat] = None,
    base: Annotated[InitBase | None, Flat] = None,
) -> int:
    """Write a settings file for lora finetune, with every setting and its default.

    For example:

        lora init
        lora init run.yaml --data orders.jsonl --rank 16 --steps 500
        lora finetune run.yaml

    What is given by flags stands in the file; all else is there as a comment with
    its default. On a terminal, without flags, it asks for what matters most.

    Parameters
    ----------
    file
        Settings file to write.
    """
    output = OutputPath(file, overwrite=overwrite)
    output.check()
    given = given_settings(
        *(lora, train, data_config, run, memory, base),
        **{"data": data, "model": model, "eval_data": eval_data, "from_adapter": from_adapter},
        **{"full": full or None, "deterministic": deterministic or None},
        **{"report": None if report else False},
        **{"implementation": None if implementation == "auto" else implementation},
    )
    if not given and sys.stdin is not None and sys.stdin.isatty():
        given = _ask()
    check_method(given)
    with output.building() as part:
        part.write_text(settings_file(given), encoding="utf-8")
    more = "" if "data" in given else " --data FILE"
    print_line(f"wrote {file}. Start with: lora finetune {file}{more}")
    return 0


def given_settings(*flags: object | None, **more: Any) -> dict[str, Any]:
    """Return the settings that are given by name: those of `more`, then those of `flags`.

    `flags` are InitLoRA, InitTrain, InitData, InitRun, InitMemory and InitBase, or None. Raises
    ConfigError for values that are out of range.
    """
    kinds = (LoRAConfig, TrainConfig, DataConfig, RunConfig, MemoryConfig, BaseWeights)
    for kind, each in zip(kinds, flags, strict=True):
        changed_by(kind(), each)  # checks itself
    given = more | {name: value for each in flags if each for name, value in vars(each).items()}
    return {name: value for name, value in given.items() if value is not None}


def settings_file(given: dict[str, Any]) -> str:
    """Return the text of a settings file: `given` as settings, the rest as comments."""
    lines = [
        "# Settings of lora finetune. A line that begins with #name: shows a default; take its #",
        "# away to change it. Flags beside the file override what stands here.",
    ]
    group = ""
    for argument in _arguments():
        name = argument.name.removeprefix("--").replace("-", "_")
        title = argument.parameter.group[0].name  # type: ignore[index]
        if title != group:
            group = title
            lines += ["", f"# ---- {title} ----"]
        lines += ["", f"# {_with_keys(str(argument.parameter.help))}"]
        choices = argument.get_choices()
        lines += [f"# One of: {', '.join(choices)}."] if choices else []
        lines.append(
            f"{name}: {_yaml(given[name])}"
            if name in given
            else f"#{name}: {_yaml(_default(argument))}".rstrip()
        )
    return "\n".join(lines) + "\n"


def _with_keys(text: str) -> str:
    """Return a help text with flags as keys of a file: --max-length as max_length."""
    return re.sub(r"--([a-z][\w-]*)", lambda found: found[1].replace("-", "_"), text)


def _arguments() -> list[Argument]:
    """Return the flags of `lora finetune` that a file may have, in the order of its help."""
    from lora.cli import arguments_of

    order = list(GROUPS)
    kept = [
        a
        for a in arguments_of("finetune")
        if a.name != "*" and a.name.removeprefix("--") not in NOT_IN_FILE
    ]
    return sorted(kept, key=lambda a: order.index(a.parameter.group[0].name))  # type: ignore[index]


def _default(argument: Argument) -> Any:
    default = argument.field_info.default
    return None if default is argument.field_info.empty else default


def _yaml(value: Any) -> str:
    from lora.conversion.converted_file import yaml_value

    if value is None or value in ((), {}):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return yaml_value(list(value) if isinstance(value, tuple) else value)


def check_method(given: dict[str, Any]) -> None:
    """Raise ConfigError for settings of LoRA, an adapter or a quantised base, and of full
    fine-tuning, together."""
    lora = [name for name in given if name in vars(LoRAConfig())]
    whole = [name for name in ("full", "from_adapter") if name in given]
    if len(whole) > 1 or (whole and lora):
        raise ConfigError(
            f"Cannot combine {', '.join((*whole, *lora))}: full fine-tuning has no adapter, and "
            "an adapter that is trained on has its own settings. Leave some out."
        )
    kind = given.get("base_dtype", "auto")
    if "full" in given and kind not in ("auto", "original"):
        raise ConfigError(
            f"Cannot use base_dtype={kind!r} with full fine-tuning: updates of weights in {kind} "
            "would be rounded away. Train with LoRA, or leave base_dtype out."
        )


def _ask() -> dict[str, Any]:
    """Return the answers to the questions; an empty answer is the default."""
    given: dict[str, Any] = {}
    for name, question, default, read in _questions():
        if name == "rank" and given.get("full"):
            continue
        while True:
            shown = f" [{default}]" if default else ""
            try:
                text = input(f"{question}{shown}: ").strip()
            except EOFError:
                raise ConfigError(
                    "Cannot write the settings: the input has ended. Give them by flags."
                ) from None
            if not text:
                break
            try:
                given[name] = read(text)
                break
            except (KeyError, ValueError) as error:
                reason = "answer y or n" if isinstance(error, KeyError) else error
                print_note(f"{text}: {reason}")
    return {name: value for name, value in given.items() if value is not False}


def _epochs(text: str) -> float:
    return float(str(TrainConfig(epochs=float(text)).epochs))


def _questions() -> Iterator[tuple[str, str, str, Callable[[str], Any]]]:
    yield "data", "Training data (a file or a directory)", "", str
    yield "model", "Model (a directory, .gguf file or owner/name)", "SmolLM2-135M-Instruct", str
    yield "full", "Train all weights instead of LoRA (y or n)", "n", lambda t: ANSWERS[t.lower()]
    yield "rank", "LoRA rank", str(LoRAConfig.rank), lambda t: LoRAConfig(rank=int(t)).rank
    yield "epochs", "Passes over the data (epochs)", f"{DEFAULT_EPOCHS:g}", _epochs
    yield "name", "Name of the run", "", str
