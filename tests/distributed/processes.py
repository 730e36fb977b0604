"""Runs a function in several processes that form one process group, on the CPU."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "lora.finetune.run"])  # once, not in every process


def run_processes(
    count: int, task: Callable[..., Any], *arguments: Any, timeout_s: float = 120
) -> list[Any]:
    """Return what `task(world, *arguments)` returned in each of `count` processes, by rank.

    `task` is a function of an importable module. Raises AssertionError with the traceback of the
    process that failed, or where one did not answer in time.
    """
    port = _free_port()
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(count)]
    processes = [
        _CONTEXT.Process(target=_run, args=(rank, count, port, pipes[rank][1], task, arguments))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    try:
        return [_receive(receiver, rank, timeout_s) for rank, (receiver, _) in enumerate(pipes)]
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()


def _receive(receiver: Connection, rank: int, timeout_s: float) -> Any:
    assert receiver.poll(timeout_s), f"rank {rank} gave no answer in {timeout_s} s"
    failure, answer = receiver.recv()
    assert failure is None, f"rank {rank} failed:\n{failure}"
    return answer


def _run(
    rank: int,
    count: int,
    port: int,
    sender: Connection,
    task: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch

    from lora.distributed.start import joined

    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in {**ranks, **address}.items()})
    torch.set_num_threads(1)
    try:
        with joined(torch.device("cpu")) as world:
            sender.send((None, task(world, *arguments)))
    except BaseException:
        sender.send((traceback.format_exc(), None))
        raise


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
