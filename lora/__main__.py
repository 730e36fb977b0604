"""The command `lora`, also as `python -m lora`."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells report it."""


def main() -> int:
    """Run the command line and return its exit code; Ctrl-C is clean while it is still imported."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    from lora.cli import main as run
    from lora.distributed.errors import run_rank

    return run_rank(run)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Exit at once from an import, which others may take for a failed one; else as Python does."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            if os.environ.get("RANK", "0") == "0":  # one of several processes says it
                os.write(2, b"lora: interrupted\n")
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
