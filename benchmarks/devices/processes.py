"""Runs cases on the devices of a machine, each in its own processes, with a time limit.

What fails or hangs is a row with its error, and the next case begins. Cases run at the same time
where their devices suffice.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from devices.cases import Case

Task = Callable[[Case, Any, bool], dict[str, Any]]
"""(case, world, smoke) -> what one rank measured; a function of an importable module."""
PRELOADED = [
    *("torch", "one_gpu.ours"),
    *("transformers.models.llama.modeling_llama", "lora.finetune.run"),
]
"""Imported once, in the process that the others are forked from; none of them touches a GPU."""
END_S = 20
"""For processes to end after all have written what they measured."""
TAIL_LINES = 60
OVERTIME_S = 15
"""For a case to end after the budget."""


@dataclass
class Machine:
    """The devices that cases run on, and how processes are started."""

    devices: int
    smoke: bool = False
    """Gloo on the CPU, tiny shapes."""
    method: str = "forkserver"
    free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = list(range(self.devices))

    @property
    def context(self) -> BaseContext:
        """What starts processes."""
        context = multiprocessing.get_context(self.method)
        if self.method == "forkserver":
            # Else asking whether there is a GPU would open it in the process that is forked.
            os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
            context.set_forkserver_preload(PRELOADED)
        return context


class Running:
    """A case whose processes have begun.

    Args:
        case: its devices are taken from `machine` until `end` gives them back.
        task: what each process runs.
        machine: where.
        beside: names of the cases that were running.
    """

    def __init__(self, case: Case, task: Task, machine: Machine, beside: list[str]) -> None:
        self.case, self.machine, self.beside = case, machine, beside
        self.gpus = [machine.free.pop(0) for _ in range(case.devices)]
        self.folder = Path(tempfile.mkdtemp(prefix="gpu_many_"))
        self.begun_s, self.written_s = time.monotonic(), 0.0
        port, context = _free_port(), machine.context
        self.processes = [
            context.Process(  # type: ignore[attr-defined]
                target=_run_rank,
                args=(task, case, rank, self.gpus, port, self.folder, machine.smoke),
            )
            for rank in range(case.devices)
        ]
        for process in self.processes:
            process.start()

    @property
    def age_s(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self.begun_s

    def problem(self) -> str | None:
        """Return why it cannot go on, "" if it is done, None while it runs."""
        found = [self._result(rank) for rank in range(self.case.devices)]
        if all(found):
            self.written_s = self.written_s or time.monotonic()
            is_gone = not any(process.is_alive() for process in self.processes)
            return "" if is_gone or time.monotonic() - self.written_s > END_S else None
        for rank, process in enumerate(self.processes):
            if process.exitcode is not None and not found[rank]:
                return f"rank {rank} ended with {process.exitcode}: {self._last_line(rank)}"
        if self.age_s > self.case.limit_s:
            return f"not in {self.case.limit_s} s; {self.said()}"
        return None

    def said(self) -> str:
        """Return what rank 0 said last; the logs get where each rank is."""
        said = self._last_line(0)
        self._dump_stacks()
        return f"rank 0 said last: {said}"

    def end(self) -> list[dict[str, Any]]:
        """Stop what still runs, give the devices back, and return what the ranks wrote."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(10)
        self.machine.free = sorted([*self.machine.free, *self.gpus])
        found = [self._result(rank) for rank in range(self.case.devices)]
        return [one for one in found if one]

    def clear(self) -> None:
        """Remove its files."""
        shutil.rmtree(self.folder)

    def logs(self) -> Iterator[str]:
        """Yield the end of each rank's output."""
        for rank in range(self.case.devices):
            path = self.folder / f"{rank}.log"
            lines = path.read_text(errors="replace").splitlines() if path.exists() else []
            yield f"--- {self.case.name}, rank {rank}"
            yield from lines[-TAIL_LINES:]

    def _result(self, rank: int) -> dict[str, Any] | None:
        path = self.folder / f"{rank}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def _last_line(self, rank: int) -> str:
        path = self.folder / f"{rank}.log"
        lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
        raised = [line for line in lines if "Error" in line or "Missing" in line]
        return (raised or lines or ["no output"])[-1][:300]

    def _dump_stacks(self) -> None:
        for process in self.processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(1)


def run_cases(
    cases: Iterable[Case], task: Task, machine: Machine, budget_s: float, log: Path | None = None
) -> Iterator[dict[str, Any]]:
    """Yield a row for each case as it ends: measured, failed, or not begun within the budget.

    A row has "case" and either "ranks", what each rank returned, or "failed" or "not_run".
    """
    waiting, running = deque(cases), list[Running]()
    try:
        yield from _run(waiting, running, task, machine, budget_s, log)
    finally:
        for one in running:
            one.end()


def _run(
    waiting: deque[Case],
    running: list[Running],
    task: Task,
    machine: Machine,
    budget_s: float,
    log: Path | None,
) -> Iterator[dict[str, Any]]:
    """Yield what `run_cases` yields; `running` has the cases whose processes are there."""
    ends_s = time.monotonic() + budget_s
    while waiting or running:
        # In order: a case that waits for more devices is not overtaken for ever.
        while waiting and waiting[0].devices <= len(machine.free):
            case = waiting.popleft()
            if case.expected_s > ends_s - time.monotonic():
                left = max(0, round(ends_s - time.monotonic()))
                yield {"case": case.name, "not_run": f"{left} s of {budget_s:g} were left"}
                continue
            beside = [one.case.name for one in running]
            running.append(Running(case, task, machine, beside))
        for one in list(running):
            problem = one.problem()
            if problem is None and time.monotonic() > ends_s + OVERTIME_S:
                problem = f"not within the budget of {budget_s:g} s; {one.said()}"
            if problem is None:
                continue
            running.remove(one)
            row = {"case": one.case.name, "process_s": round(one.age_s, 1), "beside": one.beside}
            ranks = one.end()
            if problem and log is not None:
                with log.open("a", encoding="utf-8") as file:
                    file.write("\n".join([f"=== {one.case.name}: {problem}", *one.logs(), ""]))
            one.clear()
            if problem and one.case.variant == "probe" and machine.method == "forkserver":
                machine.method = "spawn"  # if a fork of imported modules cannot open a GPU
            yield {**row, "failed": problem} if problem else {**row, "ranks": ranks}
        time.sleep(0.05)


def _run_rank(
    task: Task,
    case: Case,
    rank: int,
    gpus: list[int],
    port: int,
    folder: Path,
    smoke: bool,
) -> None:
    """Run the task as one of the case's processes and write what it returns."""
    log = (folder / f"{rank}.log").open("w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, log)
    size = case.devices
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in {**ranks, **address}.items()})
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for gpu in gpus)
    found = _joined(task, case, smoke)
    part = folder / f"{rank}.json.part"
    part.write_text(json.dumps(found))
    part.rename(folder / f"{rank}.json")


def _joined(task: Task, case: Case, smoke: bool) -> dict[str, Any]:
    import torch

    from lora.distributed.start import joined

    device = torch.device("cpu")
    if smoke:
        torch.set_num_threads(1)
    else:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    with joined(device) as world:
        is_done = False
        try:
            found = task(case, world, smoke)
            is_done = True
        finally:
            if not is_done:  # at once: leaving the others properly may wait for them
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
