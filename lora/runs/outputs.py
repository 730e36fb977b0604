"""Output files and directories: checked, locked, and complete or absent.

    out = OutputPath(Path("orders.gguf"), inputs=(model, adapter))
    with out.building() as part:     # refused here if something is in the way
        write(part)                  # renamed to orders.gguf at the end, removed after an error

Beside an output named `x`, `.x.lora-lock` is locked by the process that writes it, and
`.x.lora-part/` holds what is not complete yet. The kernel drops the lock with its process, so what
has no live owner is removed by the next command that writes into that directory. No torch here.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from lora.errors import CheckpointError, ConfigError
from lora.runs.disk import disk_error, lock_file
from lora.runs.interrupts import exit_on_signals

LOCK_SUFFIX, PART_SUFFIX = ".lora-lock", ".lora-part"
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}


@dataclass(frozen=True)
class OutputPath:
    """A file or directory that a command writes, and what it must not replace."""

    path: Path
    inputs: tuple[Path, ...] = ()
    """Files and directories that the command reads: they are never replaced."""
    overwrite: bool = False
    """Whether a regular file, or a directory of `replaceable` files, may be replaced."""
    is_directory: bool = False
    replaceable: tuple[str, ...] = ()
    """Patterns of the names in a directory that may be replaced as a whole."""

    def check(self) -> None:
        """Raise ConfigError if something is in the way, CheckpointError if the disk is."""
        self.check_target()
        parent = self.path.parent
        if not self.is_directory and not parent.is_dir():
            raise ConfigError(
                f"Cannot write {self.path}: there is no directory {parent}. Create it, or name a "
                "file in another."
            )

    def check_target(self) -> None:
        """Raise ConfigError if what is there now may not be replaced."""
        check = _check_directory if self.is_directory else _check_file
        check(self)

    @contextlib.contextmanager
    def building(self, *, wait: bool = False) -> Iterator[Path]:
        """Yield a path to write to; what is there at the end becomes the output.

        Nothing becomes of it after an exception, SIGTERM included, or if nothing was written. With
        `wait`, wait for a process that writes the same output; without, raise CheckpointError.
        """
        self.check()
        with exit_on_signals(f"writing {self.path}"), output_lock(self.path, wait=wait):
            self.check()
            folder = part_path(self.path)
            try:
                folder.mkdir(mode=0o755)
            except OSError as error:
                raise disk_error(self.path, error) from error
            part = folder / self.path.name
            yield part
            if part.exists():
                self.check()
                try:
                    _replace(part, self.path)
                except OSError as error:
                    raise disk_error(self.path, error) from error


@contextlib.contextmanager
def output_lock(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of the output `path`; before and after, remove what is incomplete of it.

    Incomplete outputs of dead processes in the same directory are removed too. Raises
    CheckpointError if another process writes `path`, unless told to `wait`.
    """
    lock = _beside(path, LOCK_SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _take(lock, path, wait=wait)
    except OSError as error:
        raise disk_error(path, error) from error
    try:
        _remove(part_path(path))
        _remove_abandoned(path.parent)
        yield
    finally:
        _remove(part_path(path))
        _release(lock, handle)


def part_path(path: Path) -> Path:
    """Return where, under the lock of the output `path`, its parts are written."""
    return _beside(path, PART_SUFFIX)


def _beside(path: Path, suffix: str) -> Path:
    # "." has no name of its own, but the directory that it stands for has one.
    whole = path if path.name else Path(os.path.abspath(path))
    return whole.parent / f".{whole.name}{suffix}"


def _check_file(output: OutputPath) -> None:
    status = _status(output.path)
    if status is None:
        return
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(
            f"Cannot write {output.path}: it is {_KINDS[stat.S_IFMT(status.st_mode)]}. Allowed: a "
            "new file, or with --overwrite a regular file that exists. Name another file."
        )
    _check_inputs(output, [output.path])
    if not output.overwrite:
        raise ConfigError(
            f"Cannot write {output.path}: the file exists. Name another file, or replace it with "
            "--overwrite."
        )


def _check_directory(output: OutputPath) -> None:
    path = output.path
    status = _status(path)
    if status is None:
        return
    if not stat.S_ISDIR(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a file")
        raise ConfigError(
            f"Cannot write {path}: it is {kind}. Allowed: a new or an empty directory. Name "
            "another directory."
        )
    inside = sorted(path.iterdir())
    _check_inputs(output, [path, *inside])
    others = [p.name for p in inside if not any(fnmatch(p.name, n) for n in output.replaceable)]
    if inside and output.overwrite and others:
        raise ConfigError(
            f"Cannot replace {path}: it holds {', '.join(others[:3])}"
            f"{' …' if len(others) > 3 else ''}, which this command does not write. Name another "
            "directory."
        )
    if inside and not output.overwrite:
        advice = ", or replace it with --overwrite" if output.replaceable else ""
        raise ConfigError(
            f"Cannot write {path}: it exists and is not empty. Name another directory{advice}."
        )


def _status(path: Path) -> os.stat_result | None:
    """Return what is at `path` itself, links not followed; None if there is nothing."""
    try:
        part_path(path).lstat()  # the longer name must be possible too
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise disk_error(path, error) from error
    try:
        return path.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise disk_error(path, error) from error


def _check_inputs(output: OutputPath, targets: Iterable[Path]) -> None:
    read = {
        identity: path
        for given in output.inputs
        for path in (given, *_entries(given))
        if (identity := _identity(path)) is not None
    }
    for target in targets:
        if (identity := _identity(target)) in read and identity is not None:
            raise ConfigError(
                f"Cannot write {output.path}: {read[identity]} is read by this command and would "
                "be replaced. Name another output."
            )


def _entries(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else []


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()  # links are followed: a hub's cache holds links to files elsewhere
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _replace(part: Path, path: Path) -> None:
    if part.is_dir() and path.is_dir() and any(path.iterdir()):
        path.rename(part.parent / ".former")  # removed with the directory of the part
    os.replace(part, path)


def _take(lock: Path, path: Path, *, wait: bool) -> int:
    """Return the open and locked file `lock`, with our process number in it."""
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(lock, flags, 0o666)
        try:
            lock_file(handle, wait=wait)
            if _is_at(handle, lock):
                started = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
                with contextlib.suppress(OSError):  # a full disk, which the output itself will meet
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, f"process {os.getpid()}, since {started}\n".encode(), 0)
                return handle
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
            os.close(handle)
            raise CheckpointError(
                f"Cannot write {path}: it is being written by {holder or 'another process'}. Wait "
                "until it ends, or name another output."
            ) from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder has removed it meanwhile: a lock on it keeps nobody out


def _is_at(handle: int, path: Path) -> bool:
    mine = os.fstat(handle)
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


def _release(lock: Path, handle: int) -> None:
    # Removed while it is still locked, so that nobody else's lock can be removed.
    with contextlib.suppress(OSError):
        lock.unlink()
    os.close(handle)


def _remove_abandoned(folder: Path) -> None:
    """Remove the incomplete outputs in `folder` whose processes are dead."""
    for lock in folder.glob(f".*{LOCK_SUFFIX}"):
        try:
            handle = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            lock_file(handle)
        except OSError:
            os.close(handle)  # its process lives
            continue
        if _is_at(handle, lock):
            _remove(lock.with_name(lock.name.removesuffix(LOCK_SUFFIX) + PART_SUFFIX))
        _release_if_at(lock, handle)


def _release_if_at(lock: Path, handle: int) -> None:
    if _is_at(handle, lock):
        _release(lock, handle)
    else:
        os.close(handle)


def _remove(part: Path) -> None:
    if part.is_symlink() or part.is_file():
        with contextlib.suppress(OSError):
            part.unlink()
    else:
        shutil.rmtree(part, ignore_errors=True)


def input_paths(*given: Path | str | None) -> tuple[Path, ...]:
    """Return those of a command's inputs that are on this disk: no output may replace them."""
    return tuple(Path(path) for path in given if path is not None and Path(path).exists())
