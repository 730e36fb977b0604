"""The two files of an adapter: read as untrusted input, written together or not at all."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora.adapters import peft_files
from lora.adapters.peft_files import (
    CONFIG_FILE,
    TENSORS_FILE,
    read_adapter_files,
    write_adapter_files,
)
from lora.errors import AdapterError, CheckpointError

DESCRIBED = {"r": 4, "peft_type": "LORA"}
TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(5, dtype=torch.bfloat16)}
METADATA = {"format": "pt", "x": "1", "y": "2", "z": "é"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_adapter_files(tmp_path / "adapter", DESCRIBED, TENSORS, METADATA)
    return tmp_path / "adapter"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written_is_read_back(folder: Path) -> None:
    files = read_adapter_files(folder)
    assert files.described == DESCRIBED
    assert files.faults == []
    assert files.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(files.tensors[name], TENSORS[name]) for name in TENSORS)
    assert METADATA.items() <= files.metadata.items()
    assert set(contents(folder)) == {CONFIG_FILE, TENSORS_FILE}


def test_the_library_reads_the_header_that_we_write(folder: Path) -> None:
    read = load_file(folder / TENSORS_FILE)
    assert all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    with safe_open(folder / TENSORS_FILE, framework="pt") as file:
        assert file.metadata()["z"] == "é"
    length = int.from_bytes((folder / TENSORS_FILE).read_bytes()[:8], "little")
    assert length % 8 == 0


def test_a_flipped_bit_in_the_values_is_found(folder: Path) -> None:
    data = bytearray((folder / TENSORS_FILE).read_bytes())
    data[-1] ^= 1
    (folder / TENSORS_FILE).write_bytes(data)
    files = read_adapter_files(folder)
    assert "its values are not those that were saved" in files.faults[0]
    assert files.tensors == {}


def test_the_same_content_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for number in range(20):
        write_adapter_files(tmp_path / str(number), DESCRIBED, TENSORS, METADATA)
        assert contents(tmp_path / str(number)) == contents(folder)


def test_a_former_adapter_is_replaced_and_other_files_stay(folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    write_adapter_files(folder, {"r": 8}, {"c": torch.zeros(1)}, {})
    files = read_adapter_files(folder)
    assert files.described == {"r": 8}
    assert list(files.tensors) == ["c"]
    assert set(contents(folder)) == {CONFIG_FILE, TENSORS_FILE, "README.md"}


@pytest.mark.parametrize("failing", [CONFIG_FILE, TENSORS_FILE])
def test_a_failed_save_leaves_the_former_adapter(
    failing: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, write = contents(folder), peft_files.atomic_write

    def fail(path: Path, data: bytes) -> None:
        if path.name == failing:
            raise CheckpointError(f"Cannot write {path}: no space. Free some.")
        write(path, data)

    monkeypatch.setattr(peft_files, "atomic_write", fail)
    with pytest.raises(CheckpointError, match="no space"):
        write_adapter_files(folder, {"r": 8}, {"c": torch.zeros(1)}, {})
    assert contents(folder) == before


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"Cannot write .*file"):
        write_adapter_files(tmp_path / "file", DESCRIBED, TENSORS, METADATA)
    with pytest.raises(CheckpointError, match=r"Cannot write .*inside.*: Not a directory"):
        write_adapter_files(tmp_path / "file" / "inside", DESCRIBED, TENSORS, METADATA)


def test_an_error_leaves_no_new_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, data: bytes) -> None:
        raise CheckpointError(f"Cannot write {path}: no space. Free some.")

    monkeypatch.setattr(peft_files, "atomic_write", fail)
    with pytest.raises(CheckpointError, match="no space"):
        write_adapter_files(tmp_path / "new" / "adapter", DESCRIBED, TENSORS, METADATA)
    assert list(tmp_path.iterdir()) == []


KILLED_SAVE = """
import os, signal, sys
from pathlib import Path
from lora.adapters import peft_files
def stop(*_): os.kill(os.getpid(), signal.SIGKILL)
peft_files.os.replace = stop
peft_files.write_adapter_files(Path(sys.argv[1]), {"r": 9}, {}, {})
"""


def test_what_a_killed_save_left_is_removed_by_the_next(folder: Path) -> None:
    before = contents(folder)
    (folder / ".saving-abc").mkdir()  # as earlier versions left it
    words = [sys.executable, "-c", KILLED_SAVE, str(folder)]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    assert {path.name for path in folder.iterdir()} > set(before)
    assert read_adapter_files(folder).described == DESCRIBED
    write_adapter_files(folder, DESCRIBED, TENSORS, METADATA)
    assert contents(folder) == before


def test_a_folder_that_is_not_there_names_the_nearest(folder: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        read_adapter_files(folder.with_name("adaptor"))
    assert "adaptor: there is no such folder. Did you mean 'adapter'?" in str(caught.value)
    assert "Name a folder with adapter_config.json" in str(caught.value)
    with pytest.raises(AdapterError, match=r"there is no such folder\. Name"):
        read_adapter_files(folder / "not" / "there")


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"it has no adapter_config.json"):
        read_adapter_files(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "it is not JSON"),
        (b"", "it is not JSON"),
        (b"\xff\xfe\x00", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"[1, 2]", "it holds a list. Allowed: a JSON object"),
        (b"null", "holds a NoneType"),
    ],
)
def test_a_broken_config_is_refused(content: bytes, words: str, folder: Path) -> None:
    (folder / CONFIG_FILE).write_bytes(content)
    with pytest.raises(AdapterError, match=words) as caught:
        read_adapter_files(folder)
    assert "Copy the adapter again" in str(caught.value)


def header(content: Any, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), end: int = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


DAMAGED = {
    "empty": b"",
    "short": b"\x01\x02",
    "garbage": bytes(range(7, 71)),
    "html": b"<!DOCTYPE html><html>404</html>",
    "length beyond the file": (10**6).to_bytes(8, "little") + b"{}",
    "length beyond everything": (2**63).to_bytes(8, "little") + b"{}",
    "no JSON": header(b"{nope"),
    "no object": header([1]),
    "no UTF-8": header(b"\xff\xff"),
    "no values": header({"a": entry()}),
    "too many values": header({"a": entry()}, b"\0" * 12),
    "shape and length differ": header({"a": entry(shape=(3,))}, b"\0" * 8),
    "unknown dtype": header({"a": entry("F99")}, b"\0" * 8),
    "negative shape": header({"a": entry(shape=(-2,))}, b"\0" * 8),
    "overflowing shape": header({"a": entry(shape=(2**40, 2**40))}, b"\0" * 8),
    "overlap": header({"a": entry(), "b": entry()}, b"\0" * 8),
    "entry without fields": header({"a": {}}, b"\0" * 8),
    "metadata that is no strings": header({"__metadata__": {"a": 1}}),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_a_fault(kind: str, folder: Path) -> None:
    (folder / TENSORS_FILE).write_bytes(DAMAGED[kind])
    files = read_adapter_files(folder)
    assert files.tensors == {}
    assert len(files.faults) == 1
    assert "adapter_model.safetensors is damaged" in files.faults[0]


def test_every_truncation_is_a_fault(folder: Path) -> None:
    whole = (folder / TENSORS_FILE).read_bytes()
    for length in range(len(whole)):
        (folder / TENSORS_FILE).write_bytes(whole[:length])
        assert read_adapter_files(folder).faults, length


def test_a_missing_file_is_a_fault(folder: Path) -> None:
    (folder / TENSORS_FILE).unlink()
    assert read_adapter_files(folder).faults == ["adapter_model.safetensors is missing"]


def test_pickles_are_not_read(folder: Path) -> None:
    (folder / TENSORS_FILE).unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (fault,) = read_adapter_files(folder).faults
    assert "adapter_model.bin is a pickle, which can run any code" in fault
    assert "save_pretrained(safe_serialization=True)" in fault


def test_a_changed_description_is_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_adapter_files(folder)
        assert caplog.messages == []
        (folder / CONFIG_FILE).write_text('{"r": 5}')
        assert read_adapter_files(folder).described == {"r": 5}
    assert len(caplog.messages) == 1
    assert "adapter_config.json was changed after it was saved" in caplog.messages[0]


def test_a_directory_above_the_adapter_names_it(folder: Path) -> None:
    with pytest.raises(AdapterError, match=rf"It holds the adapter {re.escape(str(folder))}\."):
        read_adapter_files(folder.parent)


def test_an_adapter_of_mlx_lm_is_named(folder: Path) -> None:
    described = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": 8}}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    with pytest.raises(AdapterError, match=r"it is one of mlx-lm.*Merge it with mlx_lm\.fuse"):
        read_adapter_files(folder)
