"""The command `lora`; one module of this folder a command, loaded when it is called.

The only reader of the command line. Errors of ours are printed without a traceback and exit with
2; `--debug` shows the traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError
from cyclopts.config import Env

from lora import __version__
from lora.errors import LoraError

COMMANDS: dict[str, tuple[str, str]] = {}
"""By name: where the command's function is ("module:function"), and its line in the help."""


def build_app() -> App:
    """Return the application with every command, none of them imported yet."""
    app = App(
        name="lora",
        help="LoRA fine-tuning of language models.",
        version=f"lora {__version__}",
        config=(Env("LORALM_"),),
    )
    for name, (target, line) in COMMANDS.items():
        app.command(target, name=name, help=line)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code: 0, 2 for a user's error, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        code = build_app()(words, exit_on_error=False, result_action="return_value")
    except CycloptsError:
        return 2  # cyclopts has printed what was wrong
    except LoraError as error:
        if debug:
            raise
        print(f"lora: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lora: interrupted", file=sys.stderr)
        return 130
    return code if isinstance(code, int) else 0
