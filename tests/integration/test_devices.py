"""`lora finetune` in two processes, as --devices and torchrun start them, on the CPU or on GPUs."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora import cli
from lora.distributed.errors import GO_ON
from lora.runs.disk import read_json, read_rows

# Its models are made once, in one of the workers that share the tests.
pytestmark = pytest.mark.xdist_group("devices")
STEPS = 12
LONG = {"cpu": 60, "cuda": 1200, "fsdp": 1200}
"""By device; fsdp: on GPUs that share the weights."""
FLAGS = {
    "cpu": "--device cpu --eval-every-steps 6 --save-every-steps 3",
    "cuda": "--device cuda --eval-every-steps 200",
    "fsdp": "--device cuda --eval-every-steps 200",
}
TOLERANCE = {"cpu": 1e-5, "cuda": math.inf, "fsdp": math.inf}
"""Of losses and gradient norms after LONG steps, relative; on GPUs the rows alone are compared, for
bf16 rounds them apart by then."""
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
AT_RANK_1 = """
import os
if os.environ.get("RANK") == "1":
    os.environ.update({changed!r})
"""
"""Python runs it when it starts: the processes of one run get different environments."""


IGNORES_HANGUP = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""What nohup does."""


class Start:
    """Starts runs of a tiny model."""

    def __init__(self, model: Path, data: Path, folder: Path, device: str = "cpu") -> None:
        self.model, self.data, self.folder, self.device = model, data, folder, device

    def words(self, *more: str) -> list[str]:
        words = (
            f"finetune --data {self.data} --model {self.model} --out {self.folder} --rank 4 "
            "--dropout 0.1 "
            f"--batch-size 4 --max-length 128 --samples 0 --no-report "
            f"{FLAGS[self.device]}"
        )
        return [*words.split(), *more]

    def long(self, *more: str) -> list[str]:
        """Return the flags of a run that is stopped on its way."""
        return ["--steps", str(LONG[self.device]), "--name", "run", *more]

    def here(self, *more: str) -> int:
        """Run in this process."""
        return cli.main(self.words(*more))

    def several(
        self, *more: str, by: tuple[str, ...] = (), at_rank_1: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Run in two processes, which `by` starts; by default the command itself."""
        paths = [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
        if at_rank_1:
            code = AT_RANK_1.format(changed=at_rank_1)
            (self.folder / "sitecustomize.py").write_text(code)
            paths.insert(0, str(self.folder))
        path = os.pathsep.join(paths)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        parallel = ("--parallel", "fsdp") if self.device == "fsdp" else ()
        words = self.words(*more, *parallel, *(() if by else ("--devices", "2")))
        return subprocess.Popen(
            [sys.executable, *by, "-m", "lora", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )


HAS_TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(
    scope="module",
    params=[
        "cpu",
        *(pytest.param(kind, marks=[pytest.mark.gpu, HAS_TWO]) for kind in LONG if kind != "cpu"),
    ],
)
def device(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def start(tiny_folder: Path, orders_file: Path, tmp_path: Path) -> Start:
    return Start(tiny_folder, orders_file, tmp_path)


@pytest.fixture
def on_device(tiny_folder: Path, orders_file: Path, tmp_path: Path, device: str) -> Start:
    return Start(tiny_folder, orders_file, tmp_path, device)


@pytest.fixture(scope="module")
def whole(
    tiny_folder: Path, orders_file: Path, tmp_path_factory: pytest.TempPathFactory, device: str
) -> Path:
    """The run directory of one process that nothing stopped."""
    alone = Start(tiny_folder, orders_file, tmp_path_factory.mktemp("whole"), device)
    assert alone.here(*alone.long()) == 0
    return alone.folder / "run"


def end(process: subprocess.Popen[str], code: int, within_s: float = 60) -> tuple[str, str]:
    out, said = process.communicate(timeout=within_s)
    assert process.returncode == code, (process.returncode, out, said)
    return out, said


def errors(said: str) -> list[str]:
    assert "Traceback" not in said, said
    return [line for line in said.splitlines() if line.startswith("lora: ")]


def ranks(process: subprocess.Popen[str]) -> list[int]:
    """Return the process numbers of a launcher's ranks, in order."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            variables = folder.joinpath("environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        numbers = [v for v in variables if v.startswith(b"RANK=")]
        if parent == process.pid and numbers:
            found[int(numbers[0].removeprefix(b"RANK="))] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while not is_so():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


def steps_in(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"gradient_norm") if metrics.is_file() else 0


def assert_same(run: Path, other: Path, tolerance: float) -> None:
    """Compare the metrics of two runs."""
    rows, others = read_rows(run / "metrics.jsonl"), read_rows(other / "metrics.jsonl")
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for row, expected in zip(rows, others, strict=True):
        for name, value in row.items():
            assert math.isclose(value, expected[name], rel_tol=tolerance), (name, row, expected)


def test_two_processes_train_like_one_and_report_once(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start.several("--steps", str(STEPS), "--name", "two", "--json")
    assert start.here("--steps", str(STEPS), "--name", "one") == 0
    out, said = end(process, 0)
    assert json.loads(out)["steps"] == STEPS
    assert errors(said) == []
    assert said.count("estimated") <= 1
    assert said.count("validation loss") == 3, said
    assert_same(start.folder / "two", start.folder / "one", 1e-6)
    assert read_json(start.folder / "two" / "run.json")["world_size"] == 2
    assert "world_size" not in read_json(start.folder / "one" / "run.json")
    assert sorted(path.name for path in start.folder.iterdir()) == ["one", "two"]
    capsys.readouterr()


# Without a launch: test_launch.py has the line with its rank, and test_several_processes.py the
# refusals that all ranks make together.
@pytest.mark.slow
def test_an_error_of_one_rank_ends_both_with_one_line(start: Start) -> None:
    process = start.several(
        "--steps", "3", "--name", "x", at_rank_1={"LORALM_FINETUNE_SEED": "many"}
    )
    _, said = end(process, 2)
    (line,) = errors(said)
    assert line.startswith("lora: rank 1: ")
    assert "many" in line
    assert not (start.folder / "x").exists()


@pytest.mark.slow
def test_an_error_of_all_ranks_is_one_line_without_a_rank(start: Start) -> None:
    # They differ in a setting, which all of them find out.
    other = start.several("--steps", "3", at_rank_1={"LORALM_FINETUNE_SEED": "7"})
    _, said = end(other, 2)
    (line,) = errors(said)
    assert line.startswith("lora: Cannot train together: the processes differ.")
    start.data = start.folder / "nothing.jsonl"
    process = start.several(by=TORCHRUN)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    told = [line for line in said.splitlines() if line.startswith("lora: ")]
    assert told == [
        f"lora: Cannot read examples from {start.data}: there is no such file or folder."
    ]
    assert f"traceback : {told[0].removeprefix('lora: ')}" in said  # torchrun's own summary


@pytest.mark.slow
@pytest.mark.parametrize(("by", "rank"), [((), 1), ((), 0), (TORCHRUN, 0)])
def test_a_killed_rank_ends_the_run_which_one_process_resumes(
    on_device: Start, by: tuple[str, ...], rank: int, whole: Path
) -> None:
    start, run = on_device, on_device.folder / "run"
    process = start.several(*start.long(), by=by)
    wait_until(lambda: steps_in(run) >= 8, process)
    os.kill(ranks(process)[rank], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    told = [line for line in said.splitlines() if line.startswith("lora: ")]
    assert "not finite" not in said  # the sum that broke is not taken for one of the data
    if start.device == "cpu":  # in a wait for NCCL the other one cannot speak
        survivor = f"lora: rank {1 - rank}: Another process has ended, while this one"
        assert told.pop(0).startswith(survivor)
    if by:
        assert process.returncode == 1
        assert "Signal 9 (SIGKILL) received" in said.partition("Root Cause")[2]
    else:
        assert process.returncode == 137
        assert "Traceback" not in said
        assert told[0].startswith(f"lora: rank {rank} was ended by SIGKILL: somebody killed it")
    assert start.here(*start.long("--resume")) == 0
    assert_same(run, whole, TOLERANCE[start.device])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "to", "number", "code"),
    [
        ((), "launcher", signal.SIGINT, 130),
        ((), "rank 1", signal.SIGTERM, 143),
        (TORCHRUN, "launcher", signal.SIGTERM, 1),
    ],
)
def test_a_signal_to_any_process_saves_once_and_ends_all(
    on_device: Start, by: tuple[str, ...], to: str, number: signal.Signals, code: int, whole: Path
) -> None:
    start, run = on_device, on_device.folder / "run"
    process = start.several(*start.long(), by=by)
    wait_until(lambda: steps_in(run) >= 8, process)
    os.kill(process.pid if to == "launcher" else ranks(process)[1], number)
    _, said = process.communicate(timeout=40)
    assert process.returncode == code, said
    (told,) = [line for line in said.splitlines() if line.startswith("lora: ")]
    steps, total = steps_in(run), LONG[start.device]
    assert told == (
        f"lora: {number.name} stopped {run} after step {steps} of {total}; step {steps} is saved. "
        "Give --resume to continue."
    )
    assert by or "Traceback" not in said
    again = start.several(*start.long("--resume"))
    end(again, 0)
    assert_same(run, whole, TOLERANCE[start.device])


@pytest.mark.slow
def test_torchrun_restarts_the_run_where_it_was_and_says_so(on_device: Start, whole: Path) -> None:
    by = (*TORCHRUN, "--max-restarts", "2")
    start, run = on_device, on_device.folder / "run"
    process = start.several(*start.long(), by=by)
    wait_until(lambda: steps_in(run) >= 8, process)
    os.kill(ranks(process)[1], signal.SIGKILL)
    _, said = end(process, 0)
    assert "restart 1 of 2: resuming" in said
    assert "resuming after step " in said
    assert_same(run, whole, TOLERANCE[start.device])
    assert sorted(path.name for path in start.folder.iterdir()) == ["run"]


@pytest.mark.slow
def test_a_rank_that_stands_still_is_named_and_ends_the_run(
    on_device: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORALM_MAX_WAIT_S", "12")
    start, run = on_device, on_device.folder / "run"
    process = start.several(*start.long())
    wait_until(lambda: steps_in(run) >= 8, process)
    os.kill(ranks(process)[1], signal.SIGSTOP)
    _, said = end(process, 2)
    (told,) = errors(said)
    assert re.match(
        r"lora: rank 0 has waited \d s for the gradients of step \d+\. Rank 1: not ", told
    )
    assert told.endswith(f"Rank 1 counts as gone. All processes end. {GO_ON}")


@pytest.mark.slow
def test_ranks_save_and_end_when_their_launcher_is_killed(on_device: Start) -> None:
    start, run = on_device, on_device.folder / "run"
    process = start.several("--steps", "9000", "--name", "run")  # it has 5 s to notice
    wait_until(lambda: steps_in(run) >= 8, process)
    process.kill()
    _, said = process.communicate(timeout=30)  # until they have closed standard error
    assert "lora: the process that started this run is gone: stopping" in said
    told = errors(said)[-1]
    assert told.startswith(f"lora: SIGTERM stopped {run} after step {steps_in(run)} of")


@pytest.mark.slow
def test_nohup_keeps_a_run_of_several_processes(start: Start) -> None:
    by = ("-c", IGNORES_HANGUP)
    process = start.several("--steps", "30", "--name", "run", "--devices", "2", by=by)
    wait_until(lambda: steps_in(start.folder / "run") >= 8, process)
    process.send_signal(signal.SIGHUP)
    end(process, 0)
    assert steps_in(start.folder / "run") == 30


@pytest.mark.slow
def test_a_second_interrupt_ends_processes_that_hang(on_device: Start) -> None:
    start, run = on_device, on_device.folder / "run"
    process = start.several(*start.long())
    wait_until(lambda: steps_in(run) >= 8, process)
    own = ranks(process)
    os.kill(own[1], signal.SIGSTOP)  # so that nobody comes to save
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    end(process, 130, within_s=30)
    assert not any(Path(f"/proc/{number}").exists() for number in own)
