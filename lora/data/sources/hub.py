"""Data sets of the hub: `owner/name`, `owner/name:split` or `owner/name:config:split`.

Read with the package `datasets` where the hub answers, else from what it has left in its cache. A
path on this disk goes before a name of the hub.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora.data.sources.files import PART_WORDS, SUFFIXES, OnMessage, Part
from lora.errors import DataError, DataNotFoundError, DependencyError, did_you_mean
from lora.settings.install import install_extra

MAX_HUB_WAIT_S = 8.0
"""For the hub's first answer."""
_NAME = re.compile(r"([\w.-]+/[\w.-]+)((?::[^:/\\]+){0,2})")
_NETWORK = {"huggingface_hub", "httpx", "httpx2", "requests", "aiohttp", "fsspec"}

Splits = Mapping[str, Any]
"""Data sets of the package `datasets` by the name of their split."""


@dataclass(frozen=True)
class HubName:
    """A data set of the hub, and what of it is read."""

    name: str
    """Owner and name."""
    config: str | None = None
    split: str | None = None
    """None: by the part that is wanted."""

    def __str__(self) -> str:
        return ":".join(part for part in (self.name, self.config, self.split) if part)

    def has_part(self, part: Part) -> bool:
        """Return whether it has a split for a part of its own."""
        return self.split is None and _split_of(part, load_splits(self.name, self.config)) != ""


def parse_hub_name(source: str | Path) -> HubName | None:
    """Return what a name of the hub means; None for a path, which may be missing."""
    text, path = str(source), Path(source)
    found = _NAME.fullmatch(text)
    if found is None or path.exists() or path.suffix.lower() in SUFFIXES:
        return None
    rest = [part for part in found[2].split(":") if part]
    if not rest and path.parent.is_dir():  # a file of that directory, misspelt
        return None
    config = rest[0] if len(rest) == 2 else None
    return HubName(found[1], config, rest[-1] if rest else None)


def read_hub_rows(
    hub: HubName, part: Part, on_message: OnMessage
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a split, each with its location; numbers of classes become their names.

    Raises DataError if there is no such split, DataNotFoundError if the hub does not answer and
    nothing is in the cache, DependencyError without the package `datasets`.
    """
    splits = load_splits(hub.name, hub.config)
    split = _split_of(part, splits) if hub.split is None else hub.split
    if split not in splits:
        raise DataError(
            f"Cannot read examples from {hub}: it has no split {split or part!r}. Splits: "
            f"{', '.join(splits)}.{did_you_mean(split, splits)} Name one, as in "
            f"{hub.name}:{next(iter(splits), 'train')}."
        )
    on_message(f"{hub.name}: the split {split} of {', '.join(splits)}")
    rows = splits[split]
    classes = {
        name: feature.names
        for name, feature in rows.features.items()
        if type(feature).__name__ == "ClassLabel"
    }
    for number, row in enumerate(rows, 1):
        named = {name: _class_name(names, row.get(name)) for name, names in classes.items()}
        yield f"{hub.name}:{split}:row {number}", {**row, **named}


def _class_name(names: list[str], value: object) -> object:
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _split_of(part: Part, splits: Splits) -> str:
    """Return the name of the split for a part, or ""."""
    if part in splits:
        return part
    return next((name for name in splits if name in PART_WORDS[part]), "")


@functools.lru_cache(maxsize=2)
def load_splits(name: str, config: str | None) -> Splits:
    """Return the splits of a data set of the hub; kept, as several parts are read of one."""
    if importlib.util.find_spec("datasets") is None:
        raise DependencyError(
            f"Cannot read examples from {name}: there is no such path here, and for data sets of "
            f"the hub the package datasets is not installed. Run: {install_extra('data')}"
        )
    unreached = _why_not_reached(name)
    if unreached is None:
        return _load(name, config)
    found = _find_cached(name, config)
    if not found:
        raise DataNotFoundError(
            f"Cannot read examples from {name}: there is no such path here, the hub does not give "
            f"it ({unreached}), and no earlier download is in the cache of the package datasets. "
            "Check the name and the network, or name a file or a directory."
        )
    return found


def _why_not_reached(name: str) -> str | None:
    """Return why the hub does not know the data set, within seconds; None if it does."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(name, timeout=MAX_HUB_WAIT_S)
    except Exception as error:  # network faults have no common class: see _is_network
        if not _is_network(error):
            raise
        return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return None


def _load(name: str, config: str | None) -> Splits:
    import datasets

    try:
        return dict(datasets.load_dataset(name, config))
    except Exception as error:  # the connection can also end during the download
        is_known = isinstance(error, ValueError | datasets.exceptions.DatasetsError)
        if not is_known and not _is_network(error):
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"Cannot read examples from {name}: {first}. Name a configuration as in "
            f"{name}:CONFIG:SPLIT, or download the files and name their directory."
        ) from None


def _find_cached(name: str, config: str | None) -> Splits:
    """Return the splits that an earlier download left in the package's cache, the newest."""
    import datasets

    owner, _, own = name.partition("/")
    folders = Path(datasets.config.HF_DATASETS_CACHE).glob(f"{owner}___*")
    # The package writes names in snake case: FineTome becomes fine_tome.
    same = [f for f in folders if _plain(f.name.partition("___")[2]) == _plain(own)]
    # Directories in it: configuration, version, fingerprint.
    files = [path for folder in same for path in folder.glob(f"{config or '*'}/*/*/*.arrow")]
    if not files:
        return {}
    newest = max(files, key=lambda path: path.stat().st_mtime).parent
    by_split: dict[str, list[Path]] = {}
    for path in sorted(newest.glob("*-*.arrow")):
        if not path.name.startswith("cache-"):
            split = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem).rpartition("-")[2]
            by_split.setdefault(split, []).append(path)
    return {
        split: datasets.concatenate_datasets([datasets.Dataset.from_file(str(p)) for p in paths])
        for split, paths in by_split.items()
    }


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def _is_network(error: Exception) -> bool:
    # Which package sends the requests, and so raises, depends on huggingface_hub's version.
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _NETWORK
