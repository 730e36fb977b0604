"""Files of a Hugging Face model folder: config.json, and safetensors found and opened."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora.errors import ModelError, ModelNotFoundError, gather

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


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
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"Cannot read {path} as JSON: {error}. Download it again.") from error
    if not isinstance(contents, dict):
        raise ModelError(
            f"Cannot read {path}: it holds a {type(contents).__name__}. A JSON object is needed."
        )
    return contents


class StoredTensor:
    """One tensor in an open safetensors file; nothing is read before `tensor` is called."""

    def __init__(self, file: Any, name: str) -> None:
        self.file, self.name = file, name
        header = file.get_slice(name)
        self.shape, self.dtype = tuple(header.get_shape()), str(header.get_dtype())

    def tensor(self) -> Tensor:
        tensor: Tensor = self.file.get_tensor(self.name)
        return tensor


def open_tensors(folder: Path, files: ExitStack) -> dict[str, StoredTensor]:
    """Return every tensor in `folder` by name; `files` closes what is opened.

    Raises ModelError if there are no safetensors files, or one is damaged or missing.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in _find_files(folder):
        try:
            file = files.enter_context(safe_open(path, framework="pt", device="cpu"))
            tensors |= {name: StoredTensor(file, name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"Cannot read {path} as safetensors: {error}. Its download or copy was probably "
                "incomplete: download it again."
            ) from error
    return tensors


def _find_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _indexed_files(folder)
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
