"""Files of a Hugging Face model folder: config.json, and safetensors found and opened."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora.errors import ModelError, ModelNotFoundError, gather

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the contents of `folder`/config.json. Raises ModelError if it cannot be read."""
    path = folder / "config.json"
    if not path.is_file():
        seen = "no such folder" if not folder.is_dir() else "the folder has none"
        kind = ModelError if folder.exists() else ModelNotFoundError
        raise kind(
            f"Cannot load a model from {folder}: config.json is needed, and {seen}. Pass a folder "
            "that Hugging Face's save_pretrained wrote, or a complete download."
        )
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        contents = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"Cannot read {path} as JSON: {error}. Download it again.") from error
    if not isinstance(contents, dict):
        raise ModelError(
            f"Cannot read {path}: it holds a {type(contents).__name__}. A JSON object is needed."
        )
    return contents


class StoredTensor:
    """One tensor in an open safetensors file; nothing is read before `tensor` is called."""

    def __init__(self, path: Path, file: Any, name: str, n_bytes: int) -> None:
        self.path, self.file, self.name, self.n_bytes = path, file, name, n_bytes
        header = file.get_slice(name)
        self.shape, self.dtype = tuple(header.get_shape()), str(header.get_dtype())

    def tensor(self) -> Tensor:
        """Return the tensor, mapped from the file. Raises ModelError if the file was cut."""
        check_size(self.path, self.n_bytes)
        tensor: Tensor = self.file.get_tensor(self.name)
        return tensor


def check_size(path: Path, n_bytes: int) -> None:
    """Raise ModelError if the file at `path`, which is mapped, no longer has `n_bytes`.

    A mapping of a file that is shorter now ends the process at its first use, without a word.
    """
    try:
        seen_bytes = path.stat().st_size
    except OSError:
        return  # removed or renamed: what is open stays as it is
    if seen_bytes != n_bytes:
        raise ModelError(
            f"Cannot read {path}: it had {n_bytes:,} bytes when it was opened and has "
            f"{seen_bytes:,} now. Another program is writing it: try again when that has ended."
        )


def open_tensors(folder: Path, files: ExitStack) -> dict[str, StoredTensor]:
    """Return every tensor in `folder` by name; `files` closes what is opened.

    Raises ModelError if there are no safetensors files, one is damaged or missing, or two hold the
    same tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    faults = []
    for path in _find_files(folder):
        try:
            n_bytes = path.stat().st_size
            file = files.enter_context(safe_open(path, framework="pt", device="cpu"))
            for name in file.keys():  # noqa: SIM118 - no mapping
                if name in tensors:
                    faults.append(f"{name} is in {tensors[name].path.name} and in {path.name}")
                tensors[name] = StoredTensor(path, file, name, n_bytes)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"Cannot read {path} as safetensors: {error}. Its download or copy was probably "
                "incomplete: download it again."
            ) from error
    if faults:
        heading = f"Cannot load {folder}: which of two values counts is not clear:"
        raise ModelError(gather(faults, heading, "Download the folder again, into an empty one."))
    return tensors


def _find_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _indexed_files(folder)
    shards = _shards_without_index(folder)
    if shards:
        return shards
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise ModelError(
            f"Cannot load weights from {folder}: it has only {pickled[0]}. That is a pickle, "
            "which can run any code when it is opened; model*.safetensors is needed. Convert it "
            "once with transformers: AutoModelForCausalLM.from_pretrained(FOLDER)"
            ".save_pretrained(NEW_FOLDER) writes safetensors."
        )
    seen = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
    raise ModelError(
        f"Cannot load weights from {folder}: model*.safetensors is needed, and the folder has "
        f"{seen}. Download the weights too."
    )


def _shards_without_index(folder: Path) -> list[Path]:
    """Return all shards of the one model in `folder`; none if there are no shards.

    Raises ModelError for shards that are missing, which is as much as an index would tell.
    """
    found = [(path, _SHARD.fullmatch(path.name)) for path in sorted(folder.glob("*.safetensors"))]
    shards = {path.name: match for path, match in found if match is not None}
    sets = {(match["stem"], match["count"]) for match in shards.values()}
    if not sets:
        return []
    if len(sets) > 1:
        names = ", ".join(f"{stem}-…-of-{count}" for stem, count in sorted(sets))
        raise ModelError(
            f"Cannot load weights from {folder}: it has shards of {len(sets)} models ({names}), "
            f"and no {INDEX} that says which to use. Move the others elsewhere."
        )
    stem, count = sets.pop()
    wanted = [f"{stem}-{n:05}-of-{count}.safetensors" for n in range(1, int(count) + 1)]
    missing = [f"{name} is missing" for name in wanted if name not in shards]
    if missing:
        heading = (
            f"Cannot load weights from {folder}: it has some shards of a model, no {INDEX}, and"
        )
        raise ModelError(gather(missing, heading, "Download the whole folder again."))
    return [folder / name for name in wanted]


def _indexed_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"Cannot read {index}: it has no weight_map. Download it again.")
    faults = []
    for name in sorted({str(name) for name in weight_map.values()}):
        # Checked by name, not by link target: Hugging Face's cache holds links to files elsewhere.
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            faults.append(f"{name!r} is not the name of a .safetensors file in the folder")
        elif not (folder / name).is_file():
            faults.append(f"{name} is missing")
    if faults:
        heading = f"Cannot use the files that {index} lists:"
        raise ModelError(gather(faults, heading, "Download the whole folder again."))
    return [folder / name for name in sorted(set(weight_map.values()))]
