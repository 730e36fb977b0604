"""TensorBoard event files, written in this thread, so that a disk without room stops nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lora.errors import DependencyError
from lora.runs.disk import disk_error
from lora.runs.record import MetricsRow
from lora.runs.typed_json import to_json
from lora.settings.install import install_extra

FLUSH_INTERVAL_S = 10.0


def check_tensorboard() -> None:
    """Raise DependencyError if TensorBoard is not installed."""
    try:
        import tensorboard.compat.proto.event_pb2  # noqa: F401
    except ImportError:
        raise DependencyError(
            "Cannot write TensorBoard files: tensorboard is not installed. "
            f"Run: {install_extra('track')}"
        ) from None


@contextmanager
def event_file(
    folder: Path, on_trouble: Callable[[str], None]
) -> Iterator[Callable[[MetricsRow], None]]:
    """Open an event file in `folder` and yield a writer of metrics to it.

    What the disk refuses ends the file, not the run: `on_trouble` is called once.
    """
    log = _EventFile(folder, on_trouble)
    try:
        yield log.write
    finally:
        log.close()


class _EventFile:
    # torch's SummaryWriter writes in a thread: its errors come at some later call, and on the
    # terminal as a traceback.
    def __init__(self, folder: Path, on_trouble: Callable[[str], None]) -> None:
        self._folder, self._on_trouble = folder, on_trouble
        self._file: IO[bytes] | None = None
        self._records: Any = None
        self._flushed_s = 0.0
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / name).open("wb")
        except OSError as error:
            self._stop(error)
            return
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._records = RecordWriter(self._file)
        self._append(file_version="brain.Event:2")

    def write(self, row: MetricsRow) -> None:
        """Write the numbers of a row."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = {k: v for k, v in to_json(row).items() if isinstance(v, int | float)}
        step = values.pop("step")
        scalars = [Summary.Value(tag=k, simple_value=float(v)) for k, v in values.items()]
        self._append(step=step, summary=Summary(value=scalars))

    def close(self) -> None:
        """Close the file, written to its end where the disk has room."""
        if self._file is None:
            return
        try:
            self._file.close()
        except OSError as error:
            self._stop(error)
        self._file = None

    def _append(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        if self._file is None:
            return
        try:
            self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())
            if time.monotonic() - self._flushed_s > FLUSH_INTERVAL_S:
                self._file.flush()
                self._flushed_s = time.monotonic()
        except OSError as error:
            self._stop(error)

    def _stop(self, error: OSError) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()
        cause = disk_error(self._folder, error)
        self._on_trouble(f"{cause} TensorBoard's file ends here; metrics.jsonl has all rows.")
