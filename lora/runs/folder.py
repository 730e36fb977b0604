"""A run's folder: what was asked, what came of it, and nothing half-written.

    runs/NAME/
      run.json        settings, versions, seeds, fingerprints
      metrics.jsonl   what a second run would repeat to the byte: steps, losses, rates, tokens
      samples.jsonl   answers to a few held-out prompts at each evaluation
      timings.jsonl   what another run would not repeat: seconds, memory
      checkpoints/  adapter/ or model/  pictures

No torch here.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lora.errors import CheckpointError, did_you_mean
from lora.runs.same_run import check_same_run, find_changed_machine

METRICS_FILE, TIMINGS_FILE, LOCK_FILE = "metrics.jsonl", "timings.jsonl", ".lock"
SAMPLES_FILE = "samples.jsonl"


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` to `path` whole or not at all, and only return when it is on the disk.

    Raises CheckpointError if the disk refuses; a former file at `path` is then untouched.
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
        errno.EACCES: "Make the folder writable, or choose another output folder.",
        errno.EROFS: "The file system is read-only: choose another output folder.",
        errno.ENOENT: "The folder has vanished: make it again, or choose another.",
        errno.EEXIST: "A file stands where a folder is needed: choose another output folder.",
        errno.ENOTDIR: "A file stands where a folder is needed: choose another output folder.",
    }.get(error.errno or 0, "Look at that disk, or choose another output folder.")
    return CheckpointError(f"{path} could not be written: {error.strerror}. {advice}")


@dataclass
class Run:
    """An open run folder; use it as a context manager, or call `close`."""

    folder: Path
    _lock: IO[str] | None = field(default=None, repr=False)
    on_metrics: Callable[[dict[str, Any]], None] = lambda row: None
    """Hears of each row of metrics after it is written."""
    on_trouble: Callable[[str], None] = lambda message: None
    """Hears, once, that rows cannot be written and are kept in memory until they can."""
    note: str = ""
    """What is to be told of the folder, if anything: it has another name, or goes on elsewhere."""
    _waiting: dict[str, list[str]] = field(default_factory=dict, repr=False)

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as the JSON file `name` of the folder, whole or not at all."""
        text = json.dumps(value, indent=2, sort_keys=True, default=str) + "\n"
        atomic_write(self.folder / name, text.encode())

    def read_json(self, name: str) -> Any:
        """Return the JSON file `name` of the folder. Raises CheckpointError if it is damaged."""
        return read_json(self.folder / name)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add a row of reproducible values; it has a `step`."""
        self._append(METRICS_FILE, row)
        self.on_metrics(row)

    def append_timing(self, row: dict[str, Any]) -> None:
        """Add a row of values that another run would not repeat; it has a `step`."""
        self._append(TIMINGS_FILE, row)

    def append_sample(self, row: dict[str, Any]) -> None:
        """Add an answer of the model; the row has a `step` and is reproducible."""
        self._append(SAMPLES_FILE, row)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the rows of `metrics.jsonl`."""
        return read_rows(self.folder / METRICS_FILE)

    def sync(self) -> None:
        """Return when every row is on the disk. Raises CheckpointError if the disk refuses."""
        for name in (METRICS_FILE, TIMINGS_FILE, SAMPLES_FILE):
            path = self.folder / name
            try:
                self._write_waiting(name)
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            except OSError as error:
                raise disk_error(path, error) from error

    def cut_metrics_after(self, step: int) -> None:
        """Drop the rows of later steps, which a resumed run will write again."""
        for name in (METRICS_FILE, TIMINGS_FILE, SAMPLES_FILE):
            path = self.folder / name
            if path.is_file():
                rows = [row for row in read_rows(path) if row["step"] <= step]
                atomic_write(path, "".join(_line(row) for row in rows).encode())

    def close(self) -> None:
        """Let another process use the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, name: str, row: dict[str, Any]) -> None:
        had_trouble = any(self._waiting.values())
        self._waiting.setdefault(name, []).append(_line(row))
        try:
            self._write_waiting(name)
        except OSError as error:
            if not had_trouble:
                cause = disk_error(self.folder / name, error)
                self.on_trouble(f"{cause} The rows are kept in memory until they can be written.")

    def _write_waiting(self, name: str) -> None:
        """Write the rows that wait, all of them or none."""
        data = "".join(self._waiting.get(name, ())).encode()
        if not data:
            return
        with (self.folder / name).open("ab", buffering=0) as file:
            end = file.tell()
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(end)  # a full disk takes a part of a row
                raise
        self._waiting[name] = []


def create_run(
    out: Path, name: str, *, described: dict[str, Any] | None = None, resume: bool = False
) -> Run:
    """Make the folder `out`/`name`, or open it again with `resume`, and lock it.

    A folder that holds anything is left alone, and the run takes the next free name: `name-2`,
    `name-3` … `described` becomes `run.json`. Raises CheckpointError for a name with slashes, if
    the disk refuses, if another process is using the folder, or if there is nothing to resume.
    """
    _check_name(name)
    folder = out / name if resume else _free_folder(out, name)
    check_place(out, name, resume=resume)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_FILE).open("a+", encoding="utf-8")
        _take(lock, folder)
    except OSError as error:
        raise disk_error(folder, error) from error
    run = Run(folder, lock)
    if folder.name != name:
        run.note = f"note: {out / name} is taken: this run is {folder} (resume goes on with that)"
    if described is None:
        return run
    described = {**described, "environment": environment()}
    try:
        if resume and (folder / "run.json").is_file():
            former = run.read_json("run.json")
            check_same_run(former, described, folder)
            run.note = find_changed_machine(former, described)
        run.write_json("run.json", described)
    except CheckpointError:
        run.close()
        raise
    return run


def check_place(out: Path, name: str | None, *, resume: bool) -> None:
    """Raise what `create_run` would, as far as it can be known without writing anything.

    For the beginning of a job whose folder is made late: see there.
    """
    if name is not None:
        _check_name(name)
    folder = out / (name or "")
    if resume and not folder.is_dir():
        runs = sorted(p.parent.name for p in out.glob("*/run.json")) if out.is_dir() else []
        seen = f" Runs there: {', '.join(runs[:8])}." if runs else ""
        raise CheckpointError(
            f"The run {folder} was to be resumed: there is no such folder."
            f"{did_you_mean(name or '', runs)}{seen} Start it anew, without resume."
        )
    if resume and (folder / LOCK_FILE).is_file():
        with (folder / LOCK_FILE).open(encoding="utf-8") as lock:
            _lock(lock, folder)
    place = folder if resume else out
    while not place.exists() and place != place.parent:
        place = place.parent
    kind = 0 if os.access(place, os.W_OK | os.X_OK) else errno.EACCES
    kind = errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else kind
    kind = kind if place.is_dir() else errno.ENOTDIR
    if kind:
        raise disk_error(folder, OSError(kind, os.strerror(kind)))


def _take(lock: IO[str], folder: Path) -> None:
    """Lock the folder, until we close `lock` or die, and write into it who we are."""
    _lock(lock, folder)
    lock.truncate(0)
    started = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
    lock.write(f"process {os.getpid()}, since {started}\n")
    lock.flush()


def _lock(lock: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel releases it if we die
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise CheckpointError(
            f"The run {folder} is in use by {holder}. Wait for it, or choose another name."
        ) from None


def default_name(model: str) -> str:
    """Return a name for a run on `model`: its last part and the date."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{Path(model).name.removesuffix('.gguf') or 'run'}-{now}"


def environment() -> dict[str, Any]:
    """Return the versions and the machine's kind, without its name or paths."""
    versions = {}
    for package in ("lora-lm", "torch", "safetensors", "tokenizers", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "versions": versions,
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file; a last line cut short by a crash is left out.

    Raises CheckpointError for a file that cannot be read and a line that is no object.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    return [_parse_row(line, path, number) for number, line in enumerate(lines[:-1], start=1)]


def read_first_day(folder: Path) -> datetime.datetime | None:
    """Return when the run in `folder` began, which chat templates are told again; None: no run.

    Raises CheckpointError if its run.json does not say it.
    """
    path = folder / "run.json"
    if not path.is_file():  # `create_run` says what is there, and what is not
        return None
    try:
        return datetime.datetime.fromisoformat(read_json(path)["data"]["now"])
    except (LookupError, TypeError, ValueError):
        raise CheckpointError(
            f"{path} does not say when the run began (data.now): it is not as lora wrote it. "
            "Begin a new run."
        ) from None


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within the block, values of other kinds than lora writes become a CheckpointError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} holds other values than lora writes ({type(error).__name__}: {error}). "
            "Resume from a copy of it, or begin a new run."
        ) from error


def read_json(path: Path) -> Any:
    """Return a JSON file's value. Raises CheckpointError if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise CheckpointError(f"{path} is no JSON: {error}.") from None


def _parse_row(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}, line {number}, is no JSON: {error}.") from None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise CheckpointError(f"{path}, line {number}, is no object with a step: {row!r:.60}.")
    return row


def _check_name(name: str) -> None:
    if name in ("", ".", "..") or Path(name).name != name:
        raise CheckpointError(
            f"A run was to be named {name!r}: a name is that of one folder, without slashes. "
            "Choose the folder that holds the runs with `out`."
        )


def _free_folder(out: Path, name: str) -> Path:
    number, folder = 1, out / name
    while folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        number += 1
        folder = out / f"{name}-{number}"
    return folder


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True) + "\n"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
