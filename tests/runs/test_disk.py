"""Files on disk: whole or not at all, and errors that name the file and the line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora.errors import CheckpointError
from lora.runs.disk import atomic_write, disk_error, read_json, read_rows


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_atomic_write_into_a_vanished_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Cannot write .*gone/file: .*no longer exists"):
        atomic_write(tmp_path / "gone" / "file", b"x")


def test_atomic_write_keeps_the_former_file_when_the_disk_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def refuse(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match="Free some space"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("the library's own words.\nand more"), "the library's own words"),
        (OSError(), "OSError"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_the_reason_of_a_refused_write_is_never_none(error: OSError, reason: str) -> None:
    assert f"Cannot write x: {reason}. " in str(disk_error(Path("x"), error))


def test_a_last_line_cut_short_is_left_out_and_a_damaged_one_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    path.write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(CheckpointError, match="line 2"):
        read_rows(path)


@pytest.mark.parametrize("line", [b"\xff\xfe", b"[1]", b'{"loss": 1}'])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(CheckpointError, match=r"rows\.jsonl, line 2: "):
        read_rows(path)


@pytest.mark.parametrize("content", [b"\xff", b"{", b""])
def test_a_damaged_json_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"run\.json: it is not valid JSON"):
        read_json(path)


def test_without_fcntl_everything_is_imported_and_a_lock_is_refused(tmp_path: Path) -> None:
    """As on Windows."""
    code = f"""
import pathlib, sys
sys.modules["fcntl"] = None
import lora.cli, lora.runs.outputs, lora.runs.subprocesses
from lora.errors import DependencyError
from lora.runs.directory import create_run
assert lora.cli.main(["--help"]) == 0
try:
    create_run(pathlib.Path({str(tmp_path)!r}), "run")
except DependencyError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Linux and macOS; on Windows use it in WSL 2" in done.stdout
