"""Runs a function in several processes that form one process group, on the CPU or on GPUs."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

# Threads that wait without spinning: other tests run on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
_CONTEXT = multiprocessing.get_context("forkserver")
# Once, not in every process; the first optimizer imports torch._dynamo, which takes seconds.
_CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "lora.finetune.run"])


def run_processes(
    count: int,
    task: Callable[..., Any],
    *arguments: Any,
    timeout_s: float = 120,
    device_type: str = "cpu",
) -> list[Any]:
    """Return what `task(world, *arguments)` returned in each of `count` processes, by rank.

    `task` is a function of an importable module. With "cuda" each process has a GPU. Raises
    AssertionError with the traceback of the process that failed, or where one did not answer in
    time.
    """
    port = _free_port()
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(count)]
    processes = [
        _CONTEXT.Process(
            target=_run,
            args=(rank, count, port, pipes[rank][1], device_type, task, arguments),
        )
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    try:
        return _receive([receiver for receiver, _ in pipes], timeout_s)
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()


def exit_code_of(task: Callable[..., Any], *arguments: Any) -> int:
    """Return how another process ends that runs `task(*arguments)`, as subprocess does."""
    process = _CONTEXT.Process(target=task, args=arguments)
    process.start()
    process.join()
    code: int | None = process.exitcode
    assert code is not None
    return code


def _receive(receivers: list[Connection], timeout_s: float) -> list[Any]:
    """Return the answers by rank; the first failure ends the waiting."""
    answers: dict[int, Any] = {}
    ends_s = time.monotonic() + timeout_s
    while len(answers) < len(receivers):
        waiting = [one for rank, one in enumerate(receivers) if rank not in answers]
        ready = wait(waiting, max(0, ends_s - time.monotonic()))
        silent = [rank for rank in range(len(receivers)) if rank not in answers]
        assert ready, f"ranks {silent} gave no answer in {timeout_s} s"
        for receiver in ready:
            rank = receivers.index(receiver)  # type: ignore[arg-type]
            failure, answers[rank] = receivers[rank].recv()
            assert failure is None, f"rank {rank} failed:\n{failure}"
    return [answers[rank] for rank in range(len(receivers))]


def _run(
    rank: int,
    count: int,
    port: int,
    sender: Connection,
    device_type: str,
    task: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch

    from lora.distributed.start import joined

    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in {**ranks, **address}.items()})
    gc.freeze()  # as tests/conftest.py does
    torch.set_num_threads(1)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    try:
        with joined(device) as world:
            sender.send((None, task(world, *arguments)))
    except BaseException:
        sender.send((traceback.format_exc(), None))
        raise


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
