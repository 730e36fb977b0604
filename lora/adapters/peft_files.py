"""An adapter's two files on disk: read as untrusted input, written together or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lora.errors import AdapterError, AdapterNotFoundError, did_you_mean
from lora.runs.disk import atomic_write, disk_error, os_reason
from lora.runs.outputs import output_lock, part_path
from lora.terminal import escaping_log

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
_STAGING, _FORMER_STAGING = "adapter", ".saving-*"
_PICKLE_FILE = "adapter_model.bin"
_MLX_FILE = "adapters.safetensors"
_CONFIG_DIGEST_KEY = "lora_lm_config_sha256"
_TENSORS_DIGEST_KEY = "lora_lm_tensors_sha256"

log = escaping_log(__name__)


@dataclass(frozen=True)
class AdapterFiles:
    """The content of an adapter's folder, not yet checked against a model."""

    folder: Path
    described: dict[str, Any]
    """Content of `adapter_config.json`."""
    tensors: dict[str, Tensor]
    """By PEFT's names, on the CPU."""
    metadata: dict[str, str]
    faults: list[str]
    """What is wrong with the tensor file; `tensors` is then empty."""


def read_adapter_files(folder: Path) -> AdapterFiles:
    """Return the content of both files of `folder`; a damaged tensor file becomes a fault.

    Raises AdapterError if there is no adapter or if its `adapter_config.json` cannot be read.
    """
    text = _read_config(folder)
    try:
        described = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        what = f"Cannot read {folder / CONFIG_FILE}: it is not JSON ({error})."
        raise AdapterError(f"{what} Copy the adapter again.") from None
    if not isinstance(described, dict):
        seen = type(described).__name__
        what = f"Cannot read {folder / CONFIG_FILE}: it holds a {seen}. Allowed: a JSON object."
        raise AdapterError(f"{what} Copy the adapter again.")
    _refuse_mlx(folder, described)
    path = folder / TENSORS_FILE
    if not path.is_file():
        return AdapterFiles(folder, described, {}, {}, [_why_missing(folder)])
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        fault = f"{TENSORS_FILE} is damaged: {error}"
        return AdapterFiles(folder, described, {}, {}, [fault])
    digest = metadata.get(_TENSORS_DIGEST_KEY)
    if digest is not None and digest != _digest(tensors):
        fault = (
            f"{TENSORS_FILE} is damaged: its values are not those that were saved. If a program "
            f"changed them on purpose, it must drop {_TENSORS_DIGEST_KEY} from the metadata"
        )
        return AdapterFiles(folder, described, {}, {}, [fault])
    digest = metadata.get(_CONFIG_DIGEST_KEY)
    if digest is not None and digest != hashlib.sha256(text).hexdigest():
        log.warning("%s was changed after it was saved", folder / CONFIG_FILE)
    return AdapterFiles(folder, described, tensors, metadata, [])


def read_metadata(folder: Path) -> dict[str, str]:
    """Return what an adapter's tensor file says beside its tensors; nothing of a damaged file.

    What is damaged is said where the adapter is loaded.
    """
    try:
        with safe_open(folder / TENSORS_FILE, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError):
        return {}


def fingerprint_adapter(folder: Path) -> str:
    """Return the SHA-256 of an adapter's settings and tensors: the same wherever it lies.

    Raises AdapterError if it cannot be read.
    """
    files = read_adapter_files(folder)
    settings = json.dumps(files.described, sort_keys=True).encode()
    return hashlib.sha256(settings + _digest(files.tensors).encode()).hexdigest()


def write_adapter_files(
    folder: Path, described: dict[str, Any], tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write both files of an adapter; `tensors` are on the CPU.

    Both are complete on disk before the first replaces a former adapter's, and what a killed save
    left is removed. Raises CheckpointError if a file cannot be written; a former adapter is then
    untouched.
    """
    text = (json.dumps(described, indent=2, sort_keys=True) + "\n").encode()
    metadata = metadata | {
        _CONFIG_DIGEST_KEY: hashlib.sha256(text).hexdigest(),
        _TENSORS_DIGEST_KEY: _digest(tensors),
    }
    contents = {TENSORS_FILE: _to_bytes(tensors, metadata), CONFIG_FILE: text}
    try:
        with _created(folder), output_lock(folder / _STAGING, wait=True):
            for former in folder.glob(_FORMER_STAGING):  # of versions before the lock
                shutil.rmtree(former, ignore_errors=True)
            staging = part_path(folder / _STAGING)
            staging.mkdir()
            for name, data in contents.items():
                atomic_write(staging / name, data)
            for name in contents:
                os.replace(staging / name, folder / name)
    except OSError as error:
        raise disk_error(folder, error) from error


@contextlib.contextmanager
def _created(folder: Path) -> Iterator[None]:
    """Create `folder` and its parents; after an error, those that are new are removed again."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    is_done = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
        is_done = True
    finally:
        for path in () if is_done else new:
            with contextlib.suppress(OSError):
                path.rmdir()


def _read_config(folder: Path) -> bytes:
    path = folder / CONFIG_FILE
    if path.is_file():
        try:
            return path.read_bytes()
        except OSError as error:
            what = f"Cannot read {path}: {os_reason(error)}."
            raise AdapterError(f"{what} Check its permissions.") from error
    near = _inside(folder)
    if folder.parent.is_dir() and not folder.exists():
        near = did_you_mean(folder.name, (p.name for p in folder.parent.iterdir()))
    seen = f"it has no {CONFIG_FILE}" if folder.is_dir() else "there is no such folder"
    kind = AdapterError if folder.exists() else AdapterNotFoundError
    raise kind(
        f"Cannot load an adapter from {folder}: {seen}.{near} "
        f"Name a folder with {CONFIG_FILE} and {TENSORS_FILE}."
    )


def _refuse_mlx(folder: Path, described: dict[str, Any]) -> None:
    is_mlx = "peft_type" not in described and (
        "lora_parameters" in described or (folder / _MLX_FILE).is_file()
    )
    if is_mlx:
        raise AdapterError(
            f"Cannot load an adapter from {folder}: it is one of mlx-lm, whose tensors have other "
            "names and are transposed. Allowed: PEFT's format. Merge it with mlx_lm.fuse and use "
            "the merged model, or train it again."
        )


def _inside(folder: Path) -> str:
    """Return " The adapter is in …" if directories in `folder` hold one."""
    found = sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))
    names = ", ".join(map(str, found[:5]))
    return f" It holds {'adapters' if len(found) > 1 else 'the adapter'} {names}." if found else ""


def _why_missing(folder: Path) -> str:
    if not (folder / _PICKLE_FILE).is_file():
        return f"{TENSORS_FILE} is missing"
    return (
        f"{_PICKLE_FILE} is a pickle, which can run any code when it is read. Allowed: "
        f"{TENSORS_FILE}. Load the adapter in PEFT and save_pretrained(safe_serialization=True)"
    )


def _digest(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _to_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return a safetensors file whose bytes depend on its content alone.

    The library writes the metadata in random order, so the header is rewritten in sorted order.
    Format: the header's length in 8 bytes (little-endian), the header as JSON, the tensors' bytes.
    """
    raw = save(tensors, metadata)
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]
