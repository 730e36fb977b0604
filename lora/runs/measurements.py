"""Figures measured by a run, read from its run directory. No torch."""

from __future__ import annotations

from pathlib import Path

from lora.runs.directory import TIMINGS_FILE
from lora.runs.disk import read_rows


def step_times(directory: Path) -> list[float]:
    """Return the seconds of each optimizer step of the run in `directory`."""
    return [row["step_s"] for row in read_rows(directory / TIMINGS_FILE) if "step_s" in row]


def measured_peak(directory: Path, peak_bytes: int) -> int:
    """Return a run's peak memory in bytes over all its steps, those before a resume included."""
    path = directory / TIMINGS_FILE
    rows = read_rows(path) if path.is_file() else []
    return max([peak_bytes, *(row.get("peak_memory_bytes", 0) for row in rows)])


def stored_bytes(directory: Path) -> int:
    """Return the bytes of the safetensors files in `directory`."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
