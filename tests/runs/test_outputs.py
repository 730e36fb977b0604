"""Outputs: what is in the way stays, two writers are kept apart, dead ones leave nothing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora.errors import CheckpointError, ConfigError, Interrupted
from lora.runs.outputs import OutputPath

HOLDER = """
import sys, time
from pathlib import Path
from lora.runs.outputs import OutputPath
with OutputPath(Path(sys.argv[1])).building() as part:
    part.write_bytes(b"half")
    print("building", flush=True)
    time.sleep(60)
"""


def write(output: OutputPath, data: bytes = b"new") -> None:
    with output.building() as part:
        part.write_bytes(data)


def start_holder(path: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", HOLDER, str(path)]
    holder = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "building\n"
    return holder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_file_appears_whole_and_alone(tmp_path: Path) -> None:
    write(OutputPath(tmp_path / "out"))
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == b"new"


def test_an_existing_file_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"the file exists.*--overwrite"):
        write(OutputPath(path))
    assert path.read_bytes() == b"mine"
    write(OutputPath(path, overwrite=True))
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["out"]


def test_what_is_no_regular_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "pipe")
    kinds = {"folder": "a directory", "link": "a symbolic link", "pipe": "a named pipe"}
    for name, kind in kinds.items():
        with pytest.raises(ConfigError, match=f"it is {kind}"):
            write(OutputPath(tmp_path / name, overwrite=True))
    with pytest.raises(ConfigError, match="it is a device"):
        write(OutputPath(Path(os.devnull), overwrite=True))
    assert names(tmp_path) == ["folder", "link", "pipe"]


def test_an_input_is_never_replaced_under_any_name(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    weights, source = model / "model.safetensors", tmp_path / "source.gguf"
    for path in (weights, source):
        path.write_bytes(b"weights")
    os.link(weights, tmp_path / "other-name")
    for path in (weights, source, tmp_path / "other-name"):
        with pytest.raises(ConfigError, match="is read by this command"):
            write(OutputPath(path, inputs=(model, source), overwrite=True))
        assert path.read_bytes() == b"weights"
    folder = OutputPath(model, (model,), True, is_directory=True, replaceable=("*",))
    with pytest.raises(ConfigError, match="is read by this command"):
        folder.check()


def test_a_directory_is_replaced_only_where_it_holds_what_the_command_writes(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    write_folder(OutputPath(out, is_directory=True))
    with pytest.raises(ConfigError, match="it exists and is not empty"):
        write_folder(OutputPath(out, is_directory=True))
    over = OutputPath(out, overwrite=True, is_directory=True, replaceable=("*.json",))
    write_folder(over)
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"it holds thesis\.txt, which this command does not"):
        write_folder(over)
    assert names(out) == ["config.json", "thesis.txt"]
    assert names(tmp_path) == ["out"]


def write_folder(output: OutputPath) -> None:
    with output.building() as part:
        part.mkdir()
        (part / "config.json").write_text("{}")


@pytest.mark.parametrize("name", ["nowhere/out", "n" * 250])
def test_a_name_that_cannot_be_written_is_told_before_the_work(tmp_path: Path, name: str) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=r"no directory|too long.*shorter"):
        OutputPath(tmp_path / name).check()


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with OutputPath(tmp_path / "out").building() as part:
            part.write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(tmp_path) == []


def test_a_second_writer_is_refused_and_a_killed_one_leaves_nothing_for_long(
    tmp_path: Path,
) -> None:
    holder = start_holder(tmp_path / "out")
    with pytest.raises(CheckpointError, match=f"being written by process {holder.pid}"):
        write(OutputPath(tmp_path / "out"))
    write(OutputPath(tmp_path / "other"))  # which leaves the living one's part alone
    assert names(tmp_path) == [".out.lora-lock", ".out.lora-part", "other"]
    holder.kill()
    holder.communicate()
    write(OutputPath(tmp_path / "third"))
    assert names(tmp_path) == ["other", "third"]


def test_sigterm_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    holder = start_holder(tmp_path / "out")
    holder.terminate()
    _, err = holder.communicate(timeout=30)
    assert holder.returncode != 0
    assert "SIGTERM: stopped writing" in err
    assert names(tmp_path) == []


def test_a_signal_inside_becomes_one_error(tmp_path: Path) -> None:
    def stop() -> None:
        with OutputPath(tmp_path / "out").building() as part:
            part.write_bytes(b"half")
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        stop()
    assert caught.value.exit_code == 143
    assert names(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_disk_that_is_full_when_the_lock_is_written_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    write(OutputPath(tmp_path / "out"))  # what the lock says is for people, it holds without
    assert names(tmp_path) == ["out"]
