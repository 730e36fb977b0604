"""Rows of a benchmark: printed as they come, and appended to a file."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


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
        print_row({**row, "at_s": round(time.monotonic() - begun_s)}, file)
        failed |= "failed" in row
    return int(failed)


def print_row(row: dict[str, Any], file: Path | None) -> None:
    """Print `row` as a JSON line, and append it to `file`."""
    line = json.dumps(row)
    print(line, flush=True)
    if file is not None:
        with file.open("a", encoding="utf-8") as opened:
            opened.write(line + "\n")


def main_on_a_gpu(description: str | None, rows: Iterable[dict[str, Any]]) -> int:
    """Run a benchmark whose one option is --out: print `rows`, which are measured as they come.

    Returns the exit status: 2 where there is no GPU.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="also append the lines to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"{Path(parser.prog).stem}: there is no GPU here", file=sys.stderr)
        return 2
    for row in rows:
        print_row({**row, "hardware": torch.cuda.get_device_name()}, arguments.out)
    return 0
