"""Starts a command as several processes on this machine, through PyTorch's elastic launcher.

`lora finetune … --devices 4` is `torchrun --standalone --nproc-per-node 4 -m lora finetune …`, with
one line for a process that dies, time to save after a signal, and nohup's SIGHUP ignored. No
torch is imported here before processes are to be started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

from lora.distributed.errors import GO_ON
from lora.distributed.ranks import is_started_by_torchrun, this_rank, world_size
from lora.errors import ConfigError
from lora.runs.interrupts import SIGNALS
from lora.terminal import print_note

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

MAX_CPU_PROCESSES = 16
"""Without GPUs; more only share the same cores."""
SAVE_S = 900
"""After a signal, until processes that are still there are killed: a large model is being saved.
torchrun's own limit is 30 s."""
LAST_S = 3.0
"""After a second signal, until processes that are still there are killed."""
LOOPBACK = "lo"


@dataclass(frozen=True)
class Processes:
    """What a command returns that is to be run by several processes instead."""

    count: int


def processes_to_start(devices: int | Literal["all"] | None, device: str) -> Processes | None:
    """Return what `--devices` asks to start; None where this process does the work itself.

    `device` is --device. Raises ConfigError for more GPUs than there are, for one device by
    number, and where torchrun has started another number of processes already.
    """
    if devices is None:
        return None
    if devices != "all" and devices < 1:
        raise ConfigError(f"Cannot use --devices {devices}. Allowed: 1 or more, or all.")
    if world_size() > 1 or is_started_by_torchrun():
        _check_world(devices)
        return None
    if devices == 1:
        return None
    if ":" in device:
        raise ConfigError(
            f"Cannot combine --devices {devices} with --device {device}: each process takes a GPU "
            "of its own, the first ones that are visible. Leave --device out; "
            "CUDA_VISIBLE_DEVICES=1,3 says which GPUs are visible."
        )
    import torch

    n_gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if n_gpus == 0 and device in ("auto", "cpu"):
        return _on_cpu(devices)
    if devices == "all":
        return None if n_gpus == 1 else Processes(n_gpus)
    if devices > n_gpus:
        allowed = "1" if n_gpus < 2 else f"1 to {n_gpus}, or all"
        raise ConfigError(
            f"Cannot use --devices {devices}: PyTorch sees {n_gpus} "
            f"GPU{'' if n_gpus == 1 else 's'} on this machine. Allowed: {allowed}. For several "
            "machines start the command with torchrun."
        )
    return Processes(devices)


def launch(processes: Processes, words: Sequence[str]) -> int:
    """Run `lora` with `words` in several processes; return the exit code, as of one.

    It is that of the process that failed first, 128 + the number of the signal that ended it, or
    128 + the number of the signal that this process received and passed on to all.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.ERROR)  # of the launcher: its findings are reported below, once
    _set_environment(processes)
    _catch_signals()
    newer = {"signals_to_handle": "SIGQUIT", "shutdown_timeout": SAVE_S}
    known = {each.name for each in dataclasses.fields(LaunchConfig)}  # PyTorch 2.11 lacks some
    with tempfile.TemporaryDirectory(prefix="lora-processes-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes.count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",  # not the host's name, which need not resolve
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            **{name: value for name, value in newer.items() if name in known},  # type: ignore[arg-type]
        )
        try:
            elastic_launch(config, sys.executable)(*_call(), *words)
        except ChildFailedError as error:
            return _describe_failure(*_cause(error.failures))
        except SignalException as stopped:
            return 128 + stopped.sigval
    return 0


def _catch_signals() -> None:
    """Pass the first signal on, so that all save; end all processes at a second one.

    A SIGHUP that is ignored, as under nohup, stays ignored.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            _end_children()
        raise SignalException("passed on", signal.Signals(number))

    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, receive)


def _end_children() -> None:
    """End the processes that this one has started: at once, also those that hang."""
    for number, limit_s in ((signal.SIGTERM, LAST_S), (signal.SIGKILL, 0.0)):
        until = time.monotonic() + limit_s
        for child in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
        while _children() and time.monotonic() < until:
            time.sleep(0.05)


def _children() -> list[int]:
    """Return the numbers of this process's children that run; none on a system without /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z":
                found.append(int(path.parent.name))
    return found


def _check_world(devices: int | Literal["all"]) -> None:
    here = this_rank().local_size
    if devices not in ("all", here):
        raise ConfigError(
            f"Cannot use --devices {devices}: torchrun has started {here} "
            f"process{'' if here == 1 else 'es'} on this machine. Leave --devices out, or give "
            f"torchrun --nproc-per-node {devices}."
        )


def _on_cpu(devices: int | Literal["all"]) -> Processes:
    if devices == "all":
        raise ConfigError(
            "Cannot use --devices all: PyTorch sees no GPU here. Give a number for processes on "
            "the CPU, or leave --devices out: one process uses all cores."
        )
    if devices > MAX_CPU_PROCESSES:
        raise ConfigError(
            f"Cannot use --devices {devices} without GPUs. Allowed: 1 to {MAX_CPU_PROCESSES} "
            "processes, which share the cores of this machine."
        )
    print_note(
        f"note: {devices} processes share this machine's cores, as PyTorch sees no GPU or "
        "--device is cpu: for trials, not for speed"
    )
    return Processes(devices)


def _set_environment(processes: Processes) -> None:
    """Changes this process's environment, which the others inherit."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes.count)))
    # Gloo would ask for the address of the host's name, which need not be known.
    if LOOPBACK in {name for _, name in socket.if_nameindex()}:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)


def _call() -> list[str]:
    """Return what Python runs to come to `lora.__main__`, as this process did."""
    script = Path(sys.argv[0])
    return [str(script)] if script.name == "lora" and script.is_file() else ["-m", "lora"]


def _cause(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Return the rank that ended first; those that the launcher ended because of it come later."""
    return next(iter(failures.items()))


def _describe_failure(rank: int, failure: ProcessFailure) -> int:
    if failure.exitcode > 0:
        return failure.exitcode  # it said why
    number = signal.Signals(-failure.exitcode)
    why = ""
    if number == signal.SIGKILL:
        why = ": somebody killed it, or the system did because memory ran out (`dmesg` says so)"
    print_note(
        f"lora: rank {rank} was ended by {number.name}{why}. The other processes were stopped. "
        f"{GO_ON}"
    )
    return 128 + number
