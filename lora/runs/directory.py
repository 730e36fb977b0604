"""The run directory: created, locked against other processes, written row by row.

    runs/NAME/
      run.json        configuration, versions, seeds, fingerprints
      metrics.jsonl   reproducible to the byte: steps, losses, learning rates, tokens
      samples.jsonl   answers to a few validation prompts at each evaluation
      timings.jsonl   not reproducible: seconds, memory
      result.json     what the run ended with
      checkpoints/  adapter/ or model/  pictures/

No torch here.
"""

from __future__ import annotations

import datetime
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from lora.errors import CheckpointError, RunNotFoundError, did_you_mean
from lora.runs.disk import (
    atomic_write,
    check_no_links,
    disk_error,
    lock_file,
    open_no_link,
    read_rows,
)
from lora.runs.read_record import read_metrics, read_run_record
from lora.runs.record import (
    METRICS_FILE,
    RESULT_FILE,
    RUN_FILE,
    SAMPLES_FILE,
    TIMINGS_FILE,
    MetricsRow,
    RunRecord,
    RunResult,
    SampleRow,
    describe_environment,
)
from lora.runs.same_run import check_same_run, find_changed_machine
from lora.runs.typed_json import json_text, to_json
from lora.terminal import visible

LOCK_FILE = ".lock"
MAX_NAME_BYTES = 200
"""Of a run's name: file systems have 255, and names are made of it, as those of a second run."""


@dataclass
class Run:
    """An open run directory; use it as a context manager, or call `close`."""

    folder: Path
    _lock: IO[str] | None = field(default=None, repr=False)
    on_metrics: Callable[[MetricsRow], None] = lambda row: None
    """Called with each row of metrics after it is written."""
    on_trouble: Callable[[str], None] = lambda message: None
    """Called once when rows cannot be written and are kept in memory until they can."""
    note: str = ""
    """A message for the user: the directory got another name, or the run resumes elsewhere."""
    writes: bool = True
    """False in all but one of the processes that train together: nothing is written then."""
    _waiting: dict[str, list[str]] = field(default_factory=dict, repr=False)

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as the JSON file `name` of the directory, whole or not at all."""
        if not self.writes:
            return
        text = json_text(value, indent=2, sort_keys=True, default=str) + "\n"
        atomic_write(self.folder / name, text.encode())

    def write_run_record(self, record: RunRecord) -> None:
        """Write `run.json`."""
        self.write_json(RUN_FILE, record.to_json())

    def write_result(self, result: RunResult) -> None:
        """Write `result.json`."""
        self.write_json(RESULT_FILE, to_json(result))

    def append_metrics(self, row: MetricsRow) -> None:
        """Append a row of reproducible values."""
        self._append(METRICS_FILE, row)
        self.on_metrics(row)

    def append_timing(self, row: Any) -> None:
        """Append a row of values that differ from run to run: a TimingRow, or another record."""
        self._append(TIMINGS_FILE, row)

    def append_sample(self, row: SampleRow) -> None:
        """Append an answer of the model."""
        self._append(SAMPLES_FILE, row)

    def read_metrics(self) -> list[MetricsRow]:
        """Return the rows of `metrics.jsonl`."""
        return read_metrics(self.folder)

    def sync(self) -> None:
        """Return when every row is on the disk. Raises CheckpointError if the disk refuses."""
        if not self.writes:
            return
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
        if not self.writes:
            return
        for name in (METRICS_FILE, TIMINGS_FILE, SAMPLES_FILE):
            path = self.folder / name
            if path.is_file():
                rows = [row for row in read_rows(path) if row["step"] <= step]
                atomic_write(path, "".join(map(_line, rows)).encode())

    def close(self) -> None:
        """Write the rows that wait, and release the lock: another process can use the directory."""
        self._write_last_rows()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_last_rows(self) -> None:
        """Write what a disk without room has kept in memory; report what it still refuses."""
        for name, rows in self._waiting.items():
            try:
                self._write_waiting(name)
            except OSError as error:
                cause = disk_error(self.folder / name, error)
                self.on_trouble(f"{cause} Its last {len(rows)} rows are lost.")
                self._waiting[name] = []

    def _append(self, name: str, row: Any) -> None:
        if not self.writes:
            return
        had_trouble = any(self._waiting.values())
        self._waiting.setdefault(name, []).append(_line(to_json(row)))
        try:
            self._write_waiting(name)
        except OSError as error:
            if not had_trouble:
                cause = disk_error(self.folder / name, error)
                self.on_trouble(f"{cause} The rows are kept in memory until they can be written.")

    def _write_waiting(self, name: str) -> None:
        """Write the rows that are still in memory, all of them or none."""
        data = "".join(self._waiting.get(name, ())).encode()
        if not data:
            return
        with open(self.folder / name, "ab", buffering=0, opener=open_no_link) as file:
            end = file.tell()
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(end)  # a full disk may have taken half a row
                raise
        self._waiting[name] = []


def create_run(
    out: Path,
    name: str,
    *,
    record: RunRecord | None = None,
    resume: bool = False,
) -> Run:
    """Create the run directory `out`/`name`, or open it again with `resume`, and lock it.

    A directory that is not empty is never reused: the run takes the next free name, `name-2`,
    `name-3` … `record` becomes `run.json`. Raises CheckpointError for a name with slashes, if
    the disk refuses, if another process uses the directory, or if there is nothing to resume.
    """
    check_run_name(name)
    folder = out / name if resume else _free_folder(out, name)
    check_run_directory(out, name, resume=resume)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open_no_link(str(folder / LOCK_FILE), os.O_RDWR | os.O_CREAT | os.O_APPEND)
        lock = os.fdopen(handle, "a+", encoding="utf-8")
        _take(lock, folder)
    except OSError as error:
        raise disk_error(folder, error) from error
    run = Run(folder, lock)
    if folder.name != name:
        run.note = f"note: {out / name} exists: this run is {folder} (use that name to resume it)"
    if record is None:
        return run
    record = replace(record, environment=describe_environment())
    try:
        if resume and (folder / RUN_FILE).is_file():
            former = read_run_record(folder)
            check_same_run(former, record, folder)
            run.note = find_changed_machine(former, record)
        run.write_run_record(record)
    except CheckpointError:
        run.close()
        raise
    return run


def check_run_directory(out: Path, name: str | None, *, resume: bool) -> None:
    """Raise what `create_run` would raise, as far as it can be known without writing anything.

    For the start of a job, which creates its directory only once all else is checked.
    """
    if name is not None:
        check_run_name(name)
    folder = out / (name or "")
    if resume and not folder.is_dir():
        runs = sorted(p.parent.name for p in out.glob(f"*/{RUN_FILE}")) if out.is_dir() else []
        seen = f" Runs in {out}: {', '.join(runs[:8])}." if runs else ""
        raise RunNotFoundError(
            f"Cannot resume the run {folder}: this directory does not exist."
            f"{did_you_mean(name or '', runs)}{seen} Give the name of one of them, or start a new "
            "run without --resume."
        )
    if resume:
        check_no_links(folder)
    if resume and (folder / LOCK_FILE).is_file():
        with (folder / LOCK_FILE).open(encoding="utf-8") as lock:
            _lock(lock, folder)
    existing = folder if resume else out
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    kind = 0 if os.access(existing, os.W_OK | os.X_OK) else errno.EACCES
    kind = errno.EROFS if os.statvfs(existing).f_flag & os.ST_RDONLY else kind
    kind = kind if existing.is_dir() else errno.ENOTDIR
    if kind:
        raise disk_error(folder, OSError(kind, os.strerror(kind)))


def default_name(model: str) -> str:
    """Return a name for a run on `model`: the last part of its path and the date."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{Path(model).name.removesuffix('.gguf') or 'run'}-{now}"


def read_start_time(folder: Path) -> datetime.datetime | None:
    """Return when the run in `folder` started, the date its chat template saw; None: no run there.

    Raises CheckpointError if its run.json does not hold it.
    """
    path = folder / RUN_FILE
    if not path.is_file():  # `create_run` reports what is there, and what is not
        return None
    try:
        return datetime.datetime.fromisoformat(read_run_record(folder).data.now or "")
    except ValueError:
        raise CheckpointError(
            f"Cannot resume from {path}: it does not hold the start time of the run (data.now). "
            "Start a new run."
        ) from None


def _take(lock: IO[str], folder: Path) -> None:
    """Lock the directory until `lock` is closed or we die, and write our process number into it."""
    _lock(lock, folder)
    lock.truncate(0)
    started = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
    lock.write(f"process {os.getpid()}, since {started}\n")
    lock.flush()


def _lock(lock: IO[str], folder: Path) -> None:
    try:
        lock_file(lock.fileno())  # the kernel releases it if we die
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise CheckpointError(
            f"Cannot open the run {folder}: it is in use by {holder}. Wait until it ends, or "
            "choose another name."
        ) from None


def check_run_name(name: str) -> None:
    """Raise CheckpointError for a name that cannot be that of one directory."""
    # A control character would reach the terminal; NUL and half a character cannot be written.
    encoded = name.encode(errors="ignore")
    is_text = visible(encoded.decode()) == name and "\n" not in name
    if not is_text or len(encoded) > MAX_NAME_BYTES:
        raise CheckpointError(
            f"Cannot name a run {name[:40]!r}{'…' if len(name) > 40 else ''}. Allowed: at most "
            f"{MAX_NAME_BYTES} bytes, without control characters. Choose another name."
        )
    if name in ("", ".", "..") or Path(name).name != name:
        raise CheckpointError(
            f"Cannot name a run {name!r}. Allowed: the name of one directory, without slashes. "
            "Use --out (RunConfig.out) for the directory that holds the runs."
        )


def is_taken(folder: Path) -> bool:
    """Whether a new run cannot have this directory: a file is there, or it is not empty."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _free_folder(out: Path, name: str) -> Path:
    number, folder = 1, out / name
    while is_taken(folder):
        number += 1
        folder = out / f"{name}-{number}"
    return folder


def _line(row: dict[str, Any]) -> str:
    return json_text(row, sort_keys=True) + "\n"
