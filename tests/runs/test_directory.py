"""A run's folder: whole files, reproducible rows, one process at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lora.errors import CheckpointError
from lora.runs.directory import (
    check_run_directory,
    create_run,
    default_name,
    read_start_time,
)
from lora.runs.disk import read_json, read_rows
from lora.runs.record import MetricsRow, RunRecord, TimingRow


def test_rows_are_written_alike_and_cut_after_a_step(tmp_path: Path) -> None:
    with create_run(tmp_path, "run") as run:
        for step in (1, 2, 3):
            run.append_metrics(MetricsRow(step, loss=1 / step))
            run.append_timing(TimingRow(step, step_s=0.1))
        first = (run.folder / "metrics.jsonl").read_bytes()
        run.cut_metrics_after(2)
        assert [row.step for row in run.read_metrics()] == [1, 2]
        assert [row["step"] for row in read_rows(run.folder / "timings.jsonl")] == [1, 2]
        run.append_metrics(MetricsRow(loss=1 / 3, step=3))
        assert (run.folder / "metrics.jsonl").read_bytes() == first


def test_rows_that_waited_for_room_are_written_at_the_end(
    tmp_path: Path,
) -> None:
    messages: list[str] = []
    run = create_run(tmp_path, "run")
    run.on_trouble = messages.append
    away = run.folder.rename(tmp_path / "away")
    run.append_metrics(MetricsRow(1))
    run.append_timing(TimingRow(1, step_s=0.1))
    away.rename(run.folder)
    run.close()
    assert [row.step for row in run.read_metrics()] == [1]
    run = create_run(tmp_path, "other")
    run.on_trouble = messages.append
    run.folder.rename(tmp_path / "away")
    run.append_metrics(MetricsRow(1))
    run.close()
    assert "Its last 1 rows are lost" in messages[-1]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "../a"])
def test_a_run_stays_in_the_folder_of_runs(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="the name of one directory"):
        create_run(tmp_path / "runs", name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "\x1b[31m", "x" * 300, "ü" * 101, "\udc80"])
def test_a_name_that_no_disk_or_terminal_takes_is_refused(tmp_path: Path, name: str) -> None:
    for resume in (False, True):
        with pytest.raises(CheckpointError, match="at most 200 bytes, without control") as caught:
            check_run_directory(tmp_path, name, resume=resume)
        assert len(str(caught.value)) < 250
        assert str(caught.value).isprintable()


def test_a_second_run_of_the_same_name_gets_its_own_folder(tmp_path: Path) -> None:
    with create_run(tmp_path, "run", record=RunRecord(model="tiny")) as first:
        assert read_json(first.folder / "run.json")["model"] == "tiny"
    with create_run(tmp_path, "run") as second:
        assert second.folder.name == "run-2"


def test_a_place_is_looked_at_before_anything_is_written(tmp_path: Path) -> None:
    check_run_directory(tmp_path / "not" / "yet", "run", resume=False)
    check_run_directory(tmp_path, None, resume=False)
    assert not list(tmp_path.iterdir())
    with create_run(tmp_path, "order", record=RunRecord()):
        with pytest.raises(CheckpointError, match=rf"in use by process {os.getpid()}"):
            check_run_directory(tmp_path, "order", resume=True)
        with create_run(tmp_path, "order") as second:
            assert "order exists: this run is" in second.note
    check_run_directory(tmp_path, "order", resume=True)
    with pytest.raises(CheckpointError, match=r"Did you mean 'order'\? Runs in .*: order\."):
        check_run_directory(tmp_path, "orders", resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Not a directory"):
        check_run_directory(tmp_path / "file", "run", resume=False)
    with pytest.raises(CheckpointError, match="without slashes"):
        check_run_directory(tmp_path, "../run", resume=False)


def test_a_place_that_is_read_only_is_known_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(CheckpointError, match=r"Permission denied\. Make the directory writable"):
        check_run_directory(tmp_path, "run", resume=False)


def test_a_run_that_goes_on_elsewhere_is_told(tmp_path: Path) -> None:
    record = RunRecord(train={"steps": 3}, device="cuda:0, bf16", threads=1)
    create_run(tmp_path, "run", record=record).close()
    with create_run(tmp_path, "run", record=record, resume=True) as run:
        assert run.note == ""
    elsewhere = replace(record, device="cpu, fp32")
    with create_run(tmp_path, "run", record=elsewhere, resume=True) as run:
        assert "device: cuda:0, bf16 then, cpu, fp32 now" in run.note
        assert "not with the same bytes" in run.note
    together = replace(elsewhere, world_size=2, parallel="ddp")
    with create_run(tmp_path, "run", record=together, resume=True) as run:
        assert "world_size: 1 then, 2 now" in run.note


@pytest.mark.parametrize("text", ["3", '{"data": 3}', '{"data": {"now": "x"}}', "{"])
def test_a_run_json_that_lies_is_refused(tmp_path: Path, text: str) -> None:
    create_run(tmp_path, "run").close()
    assert read_start_time(tmp_path / "run") is None
    (tmp_path / "run" / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.json"):
        read_start_time(tmp_path / "run")


def test_a_run_in_use_is_refused_and_free_again_when_its_process_dies(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lora.runs.directory import create_run\n"
        f"run = create_run(Path({str(tmp_path)!r}), 'run'); print('open', flush=True)\n"
        "sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdin is not None
    assert other.stdout.readline() == "open\n"
    with pytest.raises(CheckpointError, match=f"in use by process {other.pid}, since 20"):
        create_run(tmp_path, "run", resume=True)
    other.kill()
    other.wait()
    other.stdin.close()
    other.stdout.close()
    create_run(tmp_path, "run", resume=True).close()


@pytest.mark.parametrize("name", ["samples.jsonl", ".lock", "checkpoints", "adapter/x"])
def test_links_in_a_stranger_s_run_are_never_written_through(tmp_path: Path, name: str) -> None:
    with create_run(tmp_path, "run", record=RunRecord(model="tiny")) as run:
        (run.folder / "adapter").mkdir()
    mine = tmp_path / "mine"
    mine.write_text("mine")
    link = tmp_path / "run" / name
    link.unlink(missing_ok=True)
    link.symlink_to(mine)
    with pytest.raises(CheckpointError, match=f"{name} is a symbolic link to .*mine"):
        create_run(tmp_path, "run", resume=True)
    assert mine.read_text() == "mine"


def test_a_link_that_appears_during_the_run_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    told: list[str] = []
    with create_run(tmp_path, "run") as run:
        run.on_trouble = told.append
        (run.folder / "metrics.jsonl").symlink_to(tmp_path / "mine")
        run.append_metrics(MetricsRow(1, loss=1.0))
    assert (tmp_path / "mine").read_text() == "mine"
    assert "symbolic link is in the way" in told[0]


def test_resuming_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="this directory does not exist"):
        create_run(tmp_path, "run", resume=True)


def test_a_file_where_the_folder_should_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(CheckpointError, match="choose another output directory"):
        create_run(tmp_path / "out", "run")


@pytest.mark.parametrize(
    ("model", "start"),
    [
        ("some/folder/tiny-llama", "tiny-llama-2"),
        ("small.Q4_1.gguf", "small.Q4_1-2"),
        ("owner/Some2.5-0.5B", "Some2.5-0.5B-2"),
        (".", "run-2"),
    ],
)
def test_names_of_runs_begin_with_the_model(model: str, start: str) -> None:
    assert default_name(model).startswith(start)
