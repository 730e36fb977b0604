"""What each process waits for, reported when it takes long, and an end for what never comes.

A thread posts every few seconds what its process does to the store of the run. Nothing is posted
in a step. While a process waits for long, its thread reads what the others posted:

    lora: rank 0 has waited 60 s for the gradients of step 7. Rank 1: busy for 58 s, after the
    gradients of step 6. Rank 2: not heard from for 57 s.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch.distributed as dist

from lora.distributed.errors import (
    GO_ON,
    LOST_CODE,
    describe_lost,
    is_of_connection,
    outlive_sigterm,
    write_error_file,
)
from lora.distributed.ranks import is_started_by_torchrun
from lora.distributed.store import ERROR, STATE, read, write
from lora.errors import LostProcessError
from lora.terminal import shortened, visible

MAX_NAMED_RANKS = 8


@dataclass(frozen=True)
class WaitLimits:
    """When a wait is reported, and when it ends the run."""

    post_s: float = 5.0
    """Between two posts."""
    report_s: float = 60.0
    """Of a wait, until it is reported; again when it is twice as long."""
    silent_s: float = 300.0
    """Without a post of a process that is waited for, until it counts as gone."""
    failed_s: float = 30.0
    """After the error of another process, until the wait for it ends; a launcher is faster."""
    total_s: float = 1800.0
    """Of any wait."""


@dataclass(frozen=True)
class Activity:
    """What a process does: waits for something, or works on after something.

    Times are seconds of the clock (time.time).
    """

    what: str
    since_s: float
    is_waiting: bool
    posted_s: float = 0.0
    """When this was posted."""

    def describe(self, waited_for: str, now_s: float) -> str:
        """Return it in words, for a process that waits for `waited_for`."""
        seconds = f"{max(0.0, now_s - self.since_s):.0f} s"
        if self.is_waiting:
            what = "the same" if self.what == waited_for else self.what
            return f"waits for {what}, {seconds}"
        return f"busy for {seconds}, after {self.what}"


class Watch:
    """Context manager: a thread that posts what this process does, and reports long waits.

    Args:
        rank: of this process, among `size`.
        store: a connection that no other thread uses.
        on_message: called with a sentence for the user.
        on_end: called with the exit code where waiting has no use any more.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: dist.Store,
        limits: WaitLimits | None = None,
        on_message: Callable[[str], None] | None = None,
        on_end: Callable[[int], None] = os._exit,
    ) -> None:
        self.rank, self.size, self.limits = rank, size, limits or WaitLimits()
        self._store, self._on_message, self._end = store, on_message or _print, on_end
        self._doing = Activity("the start", time.time(), is_waiting=False)
        self._reached = time.time()
        """When the store last answered."""
        self._next_report_s = self.limits.report_s
        self._parent = os.getppid() if is_started_by_torchrun() else None
        self._seen_gone = 0
        """Looks at which the launcher was gone."""
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lora watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(timeout=self.limits.post_s)

    @contextlib.contextmanager
    def waits(self, what: str) -> Iterator[None]:
        """Within the block this process waits for `what`, in words.

        Raises LostProcessError where the connection to another process breaks.
        """
        self._doing = Activity(what, time.time(), is_waiting=True)
        try:
            yield
        except RuntimeError as error:
            if not is_of_connection(error):
                raise
            outlive_sigterm()
            raise LostProcessError(describe_lost(error, what)) from error
        finally:
            self._doing = Activity(what, time.time(), is_waiting=False)

    def _run(self) -> None:
        self.look()
        while not self._is_over.wait(self.limits.post_s):
            self.look()

    def look(self) -> None:
        """Post, and report or end a wait that is due; the thread calls it."""
        doing, now_s = self._doing, time.time()
        self._follow_launcher(doing, now_s)
        try:
            post = asdict(replace(doing, posted_s=now_s))
            write(self._store, STATE, self.rank, json.dumps(post))
            others = self._others() if self._is_long(doing, now_s) else {}
            failed = self._failed() if others else None
            self._reached = now_s
        except RuntimeError:  # the process that has the store is gone
            others, failed = {}, None
        if doing.is_waiting:
            self._judge(doing, others, failed, now_s)

    def _is_long(self, doing: Activity, now_s: float) -> bool:
        return doing.is_waiting and now_s - doing.since_s >= min(
            self.limits.report_s, self.limits.failed_s
        )

    def _others(self) -> dict[int, Activity | None]:
        posts = {rank: read(self._store, STATE, rank) for rank in range(self.size)}
        return {
            rank: None if text is None else Activity(**json.loads(text))
            for rank, text in posts.items()
            if rank != self.rank
        }

    def _failed(self) -> tuple[int, str] | None:
        for rank in range(self.size):
            message = read(self._store, ERROR, rank)
            if message is not None:
                return rank, message
        return None

    def _judge(
        self,
        doing: Activity,
        others: dict[int, Activity | None],
        failed: tuple[int, str] | None,
        now_s: float,
    ) -> None:
        waited_s = now_s - doing.since_s
        if waited_s < self.limits.report_s:
            self._next_report_s = self.limits.report_s
        sentence = (
            f"rank {self.rank} has waited {waited_s:.0f} s for {doing.what}."
            f"{_describe_others(doing, others, self.limits.report_s / 2, now_s)}"
        )
        why = self._why_hopeless(waited_s, others, failed, now_s)
        is_reporter = self._is_reporter(others, now_s)
        if why:
            if is_reporter:
                message = f"{sentence} {why} All processes end. {GO_ON}"
                write_error_file(message)
                self._on_message(message)
            else:
                time.sleep(2 * self.limits.post_s)  # the other one speaks first
            self._end(LOST_CODE)
        elif waited_s >= self._next_report_s:
            self._next_report_s *= 2
            if is_reporter:
                self._on_message(sentence)

    def _why_hopeless(
        self,
        waited_s: float,
        others: dict[int, Activity | None],
        failed: tuple[int, str] | None,
        now_s: float,
    ) -> str:
        limits = self.limits
        if failed is not None and waited_s >= limits.failed_s:
            return f"Rank {failed[0]} has failed: {shortened(failed[1], 400)}"
        if now_s - self._reached >= limits.silent_s:
            return "The process that connects all of them is gone."
        silent = [
            r for r, each in others.items() if each and now_s - each.posted_s >= limits.silent_s
        ]
        if silent and waited_s >= limits.silent_s:
            return f"Rank {silent[0]} counts as gone."
        return f"That is the limit, {limits.total_s:.0f} s." if waited_s >= limits.total_s else ""

    def _is_reporter(self, others: dict[int, Activity | None], now_s: float) -> bool:
        """Whether no lower rank waits too, which would report the same."""
        fresh_s = 3 * self.limits.post_s
        return not any(
            rank < self.rank and each and each.is_waiting and now_s - each.posted_s < fresh_s
            for rank, each in others.items()
        )

    def _follow_launcher(self, doing: Activity, now_s: float) -> None:
        """Stop as after SIGTERM if the launcher was killed: nobody else would end this process."""
        if self._parent is None or os.getppid() == self._parent:
            return
        self._seen_gone += 1
        if self._seen_gone == (1 if self.rank == 0 else 2):  # rank 0 speaks, for all on its machine
            self._on_message("the process that started this run is gone: stopping")
            os.kill(os.getpid(), signal.SIGTERM)
        elif doing.is_waiting and now_s - doing.since_s >= self.limits.report_s:
            self._end(LOST_CODE)  # in a wait that no signal ends


def _describe_others(
    doing: Activity, others: dict[int, Activity | None], silent_s: float, now_s: float
) -> str:
    """Return what the others do, those that wait for the same last and together."""
    lines, same = [], []
    for rank, each in others.items():
        if each is None:
            lines.append(f"Rank {rank}: never heard from.")
        elif now_s - each.posted_s >= silent_s:
            lines.append(f"Rank {rank}: not heard from for {now_s - each.posted_s:.0f} s.")
        elif each.is_waiting and each.what == doing.what:
            same.append(rank)
        else:
            lines.append(f"Rank {rank}: {each.describe(doing.what, now_s)}.")
    more = f" {len(lines) - MAX_NAMED_RANKS} more." if len(lines) > MAX_NAMED_RANKS else ""
    shown = "".join(f" {text}" for text in lines[:MAX_NAMED_RANKS]) + more
    count = f"{len(same)} other rank{'s' if len(same) > 1 else ''}"
    return f"{shown} The same: {count}." if same else shown


def _print(message: str) -> None:
    # Not sys.stderr: all ranks but 0 have it closed to what they print.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(visible(shortened(f"lora: {message}")), file=sys.__stderr__, flush=True)
