"""Rows of a benchmark: printed as they come, and appended to a file."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def print_rows(rows: Iterable[dict[str, Any]], file: Path | None) -> int:
    """Print `rows` as JSON lines while they are measured, and append them to `file`.

    Returns the exit status: 1 if a row has failed.
    """
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    # Ends the processes that measure too: they would keep the GPUs.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    failed, begun_s = False, time.monotonic()
    for row in rows:
        line = json.dumps({**row, "at_s": round(time.monotonic() - begun_s)})
        failed |= "failed" in row
        print(line, flush=True)
        if file is not None:
            with file.open("a", encoding="utf-8") as opened:
                opened.write(line + "\n")
    return int(failed)
