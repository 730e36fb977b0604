"""Files that are written whole or not at all, and read with errors that name the file. No torch."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora.errors import CheckpointError, DependencyError, LoraError, gather

CACHE_VARIABLE = "LORALM_CACHE"


def cache_path() -> Path:
    """Return the cache folder; it need not exist. Raises RuntimeError without a home directory."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/lora-lm").expanduser()


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` to `path` whole or not at all; return once it is on the disk.

    Raises CheckpointError if the disk refuses; an existing file at `path` is then untouched.
    """
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only the owner reads
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise disk_error(path, error) from error


def disk_error(path: Path, error: OSError) -> CheckpointError:
    """Return the error to raise when `path` could not be written."""
    advice = {
        errno.ENOSPC: "Free some space on that disk.",
        errno.EACCES: "Make the directory writable, or choose another output directory.",
        errno.EDQUOT: "Your quota is used up: free some space, or choose another directory.",
        errno.ENAMETOOLONG: "Choose a shorter name.",
        errno.ELOOP: "A symbolic link is in the way: remove it.",
        errno.EROFS: "The file system is read-only: choose another output directory.",
        errno.ENOENT: "The directory no longer exists: create it again, or choose another.",
        errno.EEXIST: "A file is in the way of the directory: choose another output directory.",
        errno.ENOTDIR: "A file is in the way of the directory: choose another output directory.",
    }.get(error.errno or 0, "Check that disk, or choose another output directory.")
    return CheckpointError(f"Cannot write {path}: {os_reason(error)}. {advice}")


def os_reason(error: OSError) -> str:
    """Return what the system said: some libraries raise an OSError with a text alone, or none."""
    lines = str(error.strerror or error).splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def check_no_links(folder: Path) -> None:
    """Raise CheckpointError unless all that `folder` holds is regular files and directories.

    A stranger's directory may hold a link, or a pipe, under the name of a file that we write.
    """
    faults = []
    for inside, folders, files in os.walk(folder):
        for name in sorted((*folders, *files)):
            path = Path(inside, name)
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                faults.append(f"{path.relative_to(folder)} is a symbolic link to {path.readlink()}")
            elif not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                faults.append(f"{path.relative_to(folder)} is a pipe, a socket or a device")
    if faults:
        heading = f"Cannot write into {folder}, what is written would leave it:"
        raise CheckpointError(gather(faults, heading, "Put files or directories in their place."))


def open_no_link(path: str, flags: int) -> int:
    """Open a file for `open(..., opener=open_no_link)`: a link at `path` is an OSError."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def lock_file(handle: int, *, wait: bool = False) -> None:
    """Lock an open file until it is closed or this process dies.

    Raises BlockingIOError if another process holds the lock and we do not `wait`, DependencyError
    on a system without such locks.
    """
    try:
        import fcntl  # not at import: Windows has none, and `lora --help` works there
    except ImportError:
        raise DependencyError(
            "Cannot lock a file: this system has no fcntl. lora runs on Linux and macOS; on "
            "Windows use it in WSL 2."
        ) from None
    fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def read_json(path: Path) -> Any:
    """Return a JSON file's value. Raises CheckpointError if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {os_reason(error)}.") from error
    except (ValueError, RecursionError) as error:  # ValueError: also what is not UTF-8
        raise CheckpointError(f"Cannot read {path}: it is not valid JSON: {error}.") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file; a last line cut short by a crash is left out.

    Raises CheckpointError if the file cannot be read or a line is not an object with a step.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {os_reason(error)}.") from error
    return [_parse_row(line, path, number) for number, line in enumerate(lines[:-1], start=1)]


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the errors of code that takes apart the content of `path` into a CheckpointError."""
    try:
        yield
    except LoraError:  # some of them are a ValueError too, and say better what is wrong
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"Cannot use {path}: unexpected content ({type(error).__name__}: {error}). "
            "Resume from a backup of it, or start a new run."
        ) from error


def _parse_row(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"Cannot read {path}, line {number}: it is not valid JSON: {error}."
        ) from None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise CheckpointError(
            f"Cannot read {path}, line {number}: not an object with a step: {row!r:.60}."
        )
    return row


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
