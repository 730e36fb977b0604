"""What --devices starts, and refuses; how their ends are reported."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from lora import cli
from lora.distributed import errors, launch
from lora.distributed.launch import Processes, processes_to_start
from lora.distributed.ranks import is_main_process, this_rank
from lora.errors import ConfigError

WORLD = {
    **{"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WORLD.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("gpus")
def test_all_or_some_of_the_gpus_are_used() -> None:
    assert processes_to_start("all", "auto") == Processes(4)
    assert processes_to_start(3, "cuda") == Processes(3)
    assert processes_to_start(1, "cuda:2") is None
    assert processes_to_start(None, "cuda:2") is None
    with pytest.raises(ConfigError, match=r"PyTorch sees 4 GPUs .* Allowed: 1 to 4, or all"):
        processes_to_start(5, "auto")
    with pytest.raises(ConfigError, match=r"--devices 2 with --device cuda:1.*VISIBLE_DEVICES"):
        processes_to_start(2, "cuda:1")


def test_processes_on_a_cpu_are_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert processes_to_start(2, "cpu") == Processes(2)
    assert "for trials, not for speed" in capsys.readouterr().err
    for wrong in (0, -1, 17):
        with pytest.raises(ConfigError, match=f"--devices {wrong}"):
            processes_to_start(wrong, "cpu")
    with pytest.raises(ConfigError, match="PyTorch sees no GPU"):
        processes_to_start("all", "cpu")
    with pytest.raises(ConfigError, match=r"sees 0 GPUs .* Allowed: 1\."):
        processes_to_start(2, "cuda")


@pytest.mark.usefixtures("world")
def test_under_torchrun_the_number_is_torchrun_s() -> None:
    assert processes_to_start(2, "auto") is None
    assert processes_to_start("all", "auto") is None
    with pytest.raises(ConfigError, match=r"torchrun has started 2 processes.*per-node 4"):
        processes_to_start(4, "auto")


@pytest.mark.usefixtures("gpus")
def test_devices_beside_a_world_size_of_another_tool_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 4, but .* no RANK, .*unset WORLD_SIZE"):
        processes_to_start(4, "auto")


@pytest.mark.usefixtures("world")
def test_a_place_that_is_named_in_part_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_main_process()
    monkeypatch.delenv("LOCAL_RANK")
    assert is_main_process()
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2, but .* no LOCAL_RANK"):
        this_rank()
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match="WORLD_SIZE='many'"):
        this_rank()


@pytest.mark.usefixtures("world")
def test_an_error_is_told_with_its_rank_and_left_for_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(errors, "FOUND_S", 0.0)
    with errors.quiet_unless_main():
        print("a result")
    errors.report_error("Cannot do it.")
    errors.report_stop("SIGTERM stopped it.")
    seen = capsys.readouterr()
    assert (seen.out, seen.err) == ("", "lora: rank 1: Cannot do it.\n")
    left = json.loads((tmp_path / "error.json").read_text())["message"]
    assert left["message"] == left["extraInfo"]["py_callstack"] == "SIGTERM stopped it."


def test_a_process_starts_others_as_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "lora"
    script.touch()
    for called, expected in [(script, [str(script)]), (tmp_path / "__main__.py", ["-m", "lora"])]:
        monkeypatch.setattr("sys.argv", [str(called), "finetune"])
        assert launch._call() == expected


def test_commands_for_one_process_are_refused_in_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {**WORLD, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for command in cli.COMMANDS.keys() - set(cli.SHARED):
        assert cli.main([command]) == 2
        assert f"Cannot run `lora {command}` in 2 processes" in capsys.readouterr().err
    assert cli.main(["merge", "--help"]) == 0


@pytest.mark.usefixtures("world")
def test_an_unexpected_exception_is_shown_with_its_rank_and_leaves_at_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os._exit", sys.exit)
    monkeypatch.setattr(errors, "FOUND_S", 0.0)

    def fail(text: str) -> int:
        raise RuntimeError(text)

    with pytest.raises(SystemExit, match="1"):
        errors.run_rank(lambda: fail("nobody expected it"))
    seen = capfd.readouterr().err
    assert seen.startswith("lora: rank 1:\nTraceback")
    assert seen.endswith("RuntimeError: nobody expected it\n")
    with pytest.raises(SystemExit, match="2"):  # of a collective that no wait encloses
        errors.run_rank(lambda: fail("[gloo/transport/tcp/pair.cc] Connection closed by peer"))
    seen = capfd.readouterr().err
    assert seen == f"lora: rank 1: Another process has ended: all of them end. {errors.GO_ON}\n"
