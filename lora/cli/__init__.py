"""The command line `lora`: one module per command, imported when the command is called.

    lora --help
    lora COMMAND --help
    lora COMMAND … --config FILE.yaml     settings from a file, under the flags' names
    lora finetune FILE.yaml               the same
    LORALM_COMMAND_FLAG=…                 settings from the environment

Flags override the environment, the environment overrides the file. A LoraError is printed without
a traceback and the exit code is 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cyclopts import (
    App,
    ArgumentCollection,
    CycloptsError,
    Parameter,
    UnknownOptionError,
    UnusedCliTokensError,
)
from cyclopts.config import Dict

from lora import __version__
from lora.cli.flags.environment import (
    ENVIRONMENT_PREFIX,
    aliases_in_environment,
    check_environment,
    environment_reader,
    given_in_environment,
    known_settings,
    settings_in_environment,
)
from lora.cli.flags.from_fields import GROUP_KEYS
from lora.cli.flags.help_page import HelpPage
from lora.cli.flags.resumed import settings_to_resume, settings_to_scale
from lora.cli.flags.translate import given_in, translate_settings, translate_words
from lora.cli.flags.values import check_values, name_pairs
from lora.cli.flags.yaml_file import flatten_groups, read_settings
from lora.distributed.errors import quiet_unless_main, report_error, report_lost, report_stop
from lora.distributed.launch import Processes, launch
from lora.distributed.ranks import is_main_process, is_one_of_several, world_size
from lora.errors import ConfigError, Interrupted, LoraError, LostProcessError, did_you_mean
from lora.runs.disk import os_reason
from lora.terminal import (
    drop_output,
    end_output,
    print_note,
    repeats_dropped,
    report_crashes,
    soften_encoding,
)
from lora.training.out_of_memory import is_out_of_memory

Sources = list[tuple[dict[str, Any], str]]
"""Settings of a command, and what they come from."""
COMMANDS: dict[str, tuple[str, str]] = {
    "finetune": (
        "lora.cli.finetune:finetune",
        "Fine-tune a model with LoRA, or all of its weights.",
    ),
    "sweep": ("lora.cli.sweep:sweep", "Train many LoRA settings in one pass and keep the best."),
    "compare": (
        "lora.cli.compare:compare",
        "Compare LoRA with full fine-tuning on the same batches.",
    ),
    "data": (
        "lora.cli.data:data",
        "Check training data: formats, lengths, which tokens get a loss.",
    ),
    "checkpoint": (
        "lora.cli.results.checkpoint:checkpoint",
        "List a run's checkpoints, or write one as an adapter.",
    ),
    "generate": ("lora.cli.generate:generate", "Answer prompts in one batch."),
    "chat": ("lora.cli.chat:chat", "Chat with a model; switch adapters at any time."),
    "eval": ("lora.cli.eval:evaluate", "Evaluate a model or adapter: loss, perplexity, answers."),
    "export": ("lora.cli.export:export", "Write a model as GGUF, or check an adapter for vLLM."),
    "plan": ("lora.cli.plan:plan", "Estimate the memory of a run and the largest batch that fits."),
    "report": ("lora.cli.report:report", "Write a report of runs: curves, tables, sample answers."),
    "merge": (
        "lora.cli.merge:merge",
        "Merge an adapter into its base model and verify the result.",
    ),
    "init": (
        "lora.cli.settings.init:init",
        "Write a settings file for lora finetune, with every default.",
    ),
    "scale": (
        "lora.cli.settings.scale:scale",
        "Write a file that starts a run on several machines: torchrun, Slurm, SkyPilot.",
    ),
    "convert-config": (
        "lora.cli.settings.convert_config:convert_config",
        "Convert a settings file of axolotl, LLaMA-Factory or torchtune.",
    ),
    "doctor": ("lora.cli.doctor:doctor", "Check this machine: packages, device, memory, disk."),
    "demo": ("lora.cli.start.demo:demo", "See a small model learn a real task in minutes."),
    "example": ("lora.cli.start.example:example", "Write example data to try the commands with."),
}
"""By name: the command's function as "module:function", and its line in `lora --help`."""

WITH_FILE = ("finetune", "sweep", "compare", "scale")
"""Commands whose first word may be a settings file, as with --config."""
SHARED = ("finetune", "sweep", "compare", "eval", "generate")
"""Commands that several processes share; one does the whole of the others."""
MEMORY_ADVICE = "Try a smaller batch, a smaller model, or a device with more memory."
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What writing to an output meets; the names of files are in other errors."""
HELP_END = (
    "Every command also takes --config FILE.yaml (keys are its flags without leading dashes), "
    f"environment variables {ENVIRONMENT_PREFIX}COMMAND_FLAG, and --debug (show the traceback of "
    "an error)."
)


def build_app(chosen: str | None = None, sources: Sequence[tuple[dict[str, Any], str]] = ()) -> App:
    """Return the application with all commands, none of them imported yet.

    The help of the command `chosen` is its docstring; the others have one line. `sources` are
    settings for it, each with what they come from; the first has precedence, after flags and
    environment.
    """
    # Under the command's name: cyclopts drops top-level keys that are names of commands.
    files = (Dict({str(chosen): settings}, source=name) for settings, name in sources)
    app = App(
        name="lora",
        help="LoRA fine-tuning of language models.",
        help_epilogue=HELP_END,
        help_format="plaintext",
        help_formatter=HelpPage(),
        version=f"lora {__version__}",
        config=(check_environment, environment_reader(chosen), *files, check_values),
        default_parameter=Parameter(
            show_env_var=False, negative_iterable=(), show_default=_show_default
        ),
        suppress_keyboard_interrupt=False,  # `main` answers it
    )
    for name, (target, line) in COMMANDS.items():
        app.command(target, name=name, help=None if name == chosen else line)
    return app


def _show_default(value: object) -> str | None:
    # A flag without a default value says in its text what happens then; `()` would say nothing.
    if value is None or value is False or value in ((), {}):
        return None
    if value is True:
        return "on"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 for a user error.

    It is 1 where a command ran to its end and its result is bad: training that diverged, a failed
    check of `lora doctor`. After Ctrl-C it is 130, after SIGTERM 143, after SIGHUP 129, once a run
    has saved its state.
    """
    words = given = list(sys.argv[1:] if argv is None else argv)
    is_debugging = "--debug" in words
    words = [word for word in words if word != "--debug"]
    soften_encoding()
    report_crashes()
    try:
        with quiet_unless_main(), repeats_dropped():
            code = _run(words)
        if isinstance(code, Processes):
            return launch(code, given)
        if sys.stdout is not None:
            sys.stdout.flush()
        # A result that is bad is rank 0's to report: another that ended with 1 would end it first.
        return code if is_main_process() else 0
    except Interrupted as stopped:
        report_stop(str(stopped))
        return stopped.exit_code
    except LostProcessError as error:
        if is_debugging:
            raise
        report_lost(str(error))
        return 2
    except (LoraError, CycloptsError) as error:
        if is_debugging:
            raise
        report_error(_describe(error))
        return 2
    except (RuntimeError, MemoryError) as error:
        if is_debugging or not is_out_of_memory(error):
            raise
        first = (str(error) or "MemoryError").splitlines()[0]
        report_error(f"out of memory: {first}. {MEMORY_ADVICE}")
        return 2
    except KeyboardInterrupt:
        report_stop("interrupted")
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has closed it
        drop_output()
        return 141
    except OSError as error:
        if is_debugging:
            raise
        if error.filename is None:
            if error.errno not in UNWRITABLE:
                raise
            report_error(f"Cannot write the output: {os_reason(error)}. Write it elsewhere.")
            drop_output()
            return 2
        report_error(f"Cannot use {str(error.filename)[:200]!r}: {os_reason(error)}.")
        return 2
    finally:
        end_output()


def _run(words: list[str]) -> int | Processes:
    words, path = _take_config(words)
    _check_command(words)
    _check_processes(words)
    sources: Sources = [] if path is None else [(read_settings(path), str(path))]
    if words and words[0] in COMMANDS:
        command, known = words[0], _known_settings(words[0])
        words = [command, *translate_words(f"lora {command}", words[1:], known, print_note)]
        sources = [
            (translate_settings(name, flatten_groups(each, known, name), known, print_note), name)
            for each, name in sources
        ]
        environment = aliases_in_environment(command, known, print_note)
        if command == "scale":  # other machines have no variables of lora finetune
            environment = settings_in_environment("finetune", known, print_note) | environment
        sources.insert(0, (environment, "environment"))
        sources.append(settings_to_scale(command, _given(words, sources)))
        sources.append(settings_to_resume(command, _given(words, sources)))
    app = build_app(words[0] if words else None, sources)
    code = app(
        name_pairs(words), exit_on_error=False, print_error=False, result_action="return_value"
    )
    return code if isinstance(code, (int, Processes)) else 0


def _given(words: list[str], sources: Sources) -> dict[str, str]:
    """Return what a call gives on its own, by name: from files, the environment and flags."""
    given: dict[str, str] = {}
    for settings, _ in reversed(sources):
        given |= {key.replace("-", "_"): v for key, v in settings.items() if isinstance(v, str)}
    return given | given_in_environment(words[0]) | given_in(words[1:])


def arguments_of(command: str) -> ArgumentCollection:
    """Return the arguments of a command, in the order of its signature."""
    app = build_app()
    with app.app_stack([command]):
        return app[command].assemble_argument_collection()


def _known_settings(command: str) -> dict[str, str]:
    return known_settings(arguments_of(command))


def _check_command(words: list[str]) -> None:
    # Before cyclopts, which would import every command to suggest one.
    word = words[0] if words else "--help"
    if word in COMMANDS or word in ("--help", "-h", "--version"):
        return
    known = ", ".join(sorted(COMMANDS))
    kind = "option" if word.startswith("-") else "command"
    near = did_you_mean(word, [*COMMANDS, "--help", "--version"])
    raise ConfigError(f"Unknown {kind} {word!r}.{near} Commands: {known}. See `lora --help`.")


def _check_processes(words: list[str]) -> None:
    command = words[0] if words else ""
    asks = {"--help", "-h"} & set(words)
    if command in COMMANDS and command not in SHARED and not asks and is_one_of_several():
        raise ConfigError(
            f"Cannot run `lora {command}` in {world_size()} processes: each would do the whole of "
            f"it. Run it without torchrun. Commands for several: {', '.join(SHARED)}."
        )


def _take_config(words: list[str]) -> tuple[list[str], Path | None]:
    rest: list[str] = []
    paths: list[str] = []
    is_file = len(words) > 1 and words[0] in WITH_FILE and words[1].endswith((".yaml", ".yml"))
    if is_file and not words[1].startswith("-"):
        paths, words = [words[1]], [words[0], *words[2:]]
    remaining = iter(words)
    for word in remaining:
        if word == "--config":
            paths.append(next(remaining, ""))
        elif word.startswith("--config="):
            paths.append(word.removeprefix("--config="))
        else:
            rest.append(word)
    if len(paths) > 1 or "" in paths:
        raise ConfigError(
            f"Cannot read --config: it takes one YAML file, {len([p for p in paths if p])} are "
            "given. Write --config FILE.yaml once."
        )
    return rest, Path(os.path.expanduser(paths[0])) if paths else None


def _describe(error: LoraError | CycloptsError) -> str:
    if isinstance(error, LoraError):
        return str(error)
    command = " ".join(["lora", *(error.command_chain or ())])
    advice = f"See `{command} --help`."
    if isinstance(error, UnusedCliTokensError):
        unused = list(error.unused_tokens or ())
        if unused and unused[0].lower() in ("true", "false"):
            advice = f"A switch takes no word: write --NAME={unused[0]}, or --no-NAME. {advice}"
        return f"Unexpected arguments of {command}: {' '.join(unused)!r}. {advice}"
    key = (error.token.keyword or "") if isinstance(error, UnknownOptionError) else ""
    if not (isinstance(error, UnknownOptionError) and key.startswith("[")):
        return f"{error} {advice}"
    key = key.strip("[]").split("][")[0]  # cyclopts writes a key of a file as [key], or [a][b]
    names = [name for argument in error.argument_collection or () for name in argument.names]
    allowed = sorted(name.removeprefix("--") for name in names if name.startswith("--"))
    near = did_you_mean(key, [*allowed, *GROUP_KEYS])
    if key in GROUP_KEYS:
        near = " This is a group, which has settings under it."
    return (
        f"Cannot use {error.token.source}: unknown setting {key!r}.{near} "
        f"Allowed: {', '.join(allowed)}."
    )
