"""TensorBoard's event files: what is in them, and a disk that takes no more."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lora.finetune.event_files import event_file
from lora.runs.record import MetricsRow


class FullFile:
    """A file on a disk that has no room."""

    def write(self, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_tensorboard_s_file_ends_on_a_full_disk_and_the_run_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    said: list[str] = []
    row = MetricsRow(step=3, loss=0.5, spike=True, eval_not_finite="nan")
    with event_file(tmp_path / "whole", said.append) as write:
        write(row)
    (path,) = (tmp_path / "whole").iterdir()
    first, event = LegacyEventFileLoader(str(path)).Load()
    values = {value.tag: value.simple_value for value in event.summary.value}
    assert (first.file_version, event.step, values) == (
        "brain.Event:2",
        3,
        {"loss": 0.5, "spike": 1},
    )
    assert not said
    (tmp_path / "file").touch()
    with event_file(tmp_path / "file", said.append) as write:  # no directory can be made there
        write(row)
    assert "A file is in the way" in said[0]
    monkeypatch.setattr(Path, "open", lambda *_: FullFile())
    with event_file(tmp_path / "full", said.append) as write:
        write(row)
        write(row)
    assert "No space left" in said[1]
    assert len(said) == 2
