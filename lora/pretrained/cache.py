"""The cache of converted models: a manifest of checksums, written last and verified at each load.

CRC-32 finds every single flipped bit and nearly all other damage, at several GB/s on two cores. Up
to MAX_VERIFIED_BYTES a file is read whole; of a larger one SAMPLED_CHUNKS chunks, others each time,
unless its size or time is no longer the manifest's. It guards against disks, not against people.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "conversion.json"
MAX_VERIFIED_BYTES = 4 * 2**30
"""Largest file that is verified whole at each load."""
CHUNK_BYTES, SAMPLED_CHUNKS = 16 * 2**20, 64
_N_THREADS = 2

_Identity = tuple[str, tuple[tuple[str, int, int, int], ...]]
_verified: set[_Identity] = set()
"""Folders as this process has verified them: a command looks one model up several times."""


def write_manifest(folder: Path, source: Path) -> None:
    """Write the checksums of all files in `folder`, which was converted from `source`."""
    files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"source": str(source), "files": files}))


def is_intact(folder: Path) -> bool:
    """Whether `folder` holds a finished conversion with all of its files, undamaged."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        identity = _identity(folder, sorted(files))
        if identity not in _verified:
            if not files or not all(_is_intact(folder / name, files[name]) for name in files):
                return False
            _verified.add(identity)
        return True
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _describe(path: Path) -> dict[str, Any]:
    status = path.stat()
    n_chunks = -(-status.st_size // CHUNK_BYTES)
    sums = _checksums(path, range(n_chunks))
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns, "crc32": sums}


def _is_intact(path: Path, described: dict[str, Any]) -> bool:
    status, sums = path.stat(), described["crc32"]
    if status.st_size != described["bytes"]:
        return False
    chosen: Iterable[int] = range(len(sums))
    is_untouched = status.st_mtime_ns == described["modified_ns"]
    if status.st_size > MAX_VERIFIED_BYTES and is_untouched:
        chosen = sorted(random.SystemRandom().sample(range(len(sums)), SAMPLED_CHUNKS))
    return _checksums(path, chosen) == [sums[n] for n in chosen]


def _checksums(path: Path, chunks: Iterable[int]) -> list[int]:
    # zlib lets other threads run while it works on a chunk.
    with ThreadPoolExecutor(_N_THREADS) as pool:
        return list(pool.map(lambda n: _checksum(path, n), chunks))


def _checksum(path: Path, chunk: int) -> int:
    with path.open("rb") as file:
        file.seek(chunk * CHUNK_BYTES)
        return zlib.crc32(file.read(CHUNK_BYTES))


def _identity(folder: Path, names: list[str]) -> _Identity:
    seen = []
    for name in names:
        status = (folder / name).stat()
        seen.append((name, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return str(folder.resolve()), tuple(seen)
