"""The safetensors files of a model folder written: one, or shards with an index."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora.pretrained.hf_files import INDEX, SINGLE
from lora.runs.disk import disk_error
from lora.runs.tensor_files import TensorParts, write_tensor_parts

MAX_SHARD_BYTES = 4 * 2**30
"""Largest size of a shard, unless one tensor alone is larger."""


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Make `folder`; what fails inside the context is a CheckpointError, and its parts are gone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        for part in folder.glob(".*.part"):
            part.unlink(missing_ok=True)
        raise disk_error(folder, error) from error


def split_into_shards(sizes_bytes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Return the names in order, cut into shards of at most `max_shard_bytes` where possible."""
    shards: list[list[str]] = [[]]
    filled_bytes = 0
    for name, n_bytes in sizes_bytes.items():
        if shards[-1] and filled_bytes + n_bytes > max_shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(name)
        filled_bytes += n_bytes
    return shards


def write_shards(
    folder: Path,
    shards: list[list[str]],
    layout: Callable[[str], Mapping[str, TensorParts]],
    total_bytes: int,
) -> None:
    """Write the weights of each shard, and an index if there are several.

    `layout` returns the tensors of a file that make up the weight it is called with: it is called
    when its shard is written. Every file is written under a temporary name and then renamed.
    Raises OSError if the disk refuses.
    """
    n = len(shards)
    names = [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)] if n > 1 else [SINGLE]
    weight_map: dict[str, str] = {}
    for file_name, shard in zip(names, shards, strict=True):
        ready = {key: parts for name in shard for key, parts in layout(name).items()}
        temporary = folder / f".{file_name}.part"
        write_tensor_parts(temporary, ready, {"format": "pt"})
        os.replace(temporary, folder / file_name)
        weight_map.update(dict.fromkeys(ready, file_name))
        del ready  # may hold the shard's tensors, beside those of the next one
    if n > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_json(folder / INDEX, index)
    # A file of the other layout, left by an earlier save, would be loaded instead of this one.
    (folder / (SINGLE if n > 1 else INDEX)).unlink(missing_ok=True)


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Write `contents` under a temporary name, then under its own."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
