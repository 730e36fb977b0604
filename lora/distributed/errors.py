"""The end of one process among several: reported once, and it never waits for the others.

    lora: Cannot use …               all of them failed alike
    lora: rank 2: Cannot use …       one did
    lora: rank 0: Another process has ended, while this one waited for the gradients of step 7 …

torchrun finds the message in its error file, and quotes it in its own summary.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType

from lora.distributed.ranks import (
    ERROR_FILE,
    is_main_process,
    is_one_of_several,
    is_started_by_torchrun,
    this_rank,
)
from lora.terminal import end_output, print_note, shortened

MEET_S, MEET_JOINED_S = 8.0, 2.0
"""What a failed process waits for the others to fail alike: while all of them start, and later."""
POLL_S = 0.05
FOUND_S = 1.0
"""A process that lost another ends so much later, and one that leaves the message to another: the
launcher ends all of them when it finds that the first has ended."""
GO_ON = "A training run continues from its newest checkpoint with --resume."
LOST_CODE = 2
UNEXPECTED = 1
"""Exit code of Python after an exception that nobody expected."""


@contextlib.contextmanager
def quiet_unless_main() -> Iterator[None]:
    """Within the block nothing that this process prints is shown, unless it is rank 0 or alone."""
    if is_main_process():
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def report_error(message: str) -> None:
    """Print why this process ends: once for all processes that end for the same reason."""
    write_error_file(message)
    if not is_one_of_several():
        print_note(f"lora: {message}")
        return
    who = _who_fails_alike(message)
    if who[0] == this_rank().rank:
        print_note(f"lora: {_named(who)}{message}")
    else:
        time.sleep(FOUND_S)


def report_stop(message: str) -> None:
    """Print why all processes stop, where they have agreed on it: rank 0 alone does."""
    write_error_file(message)
    if is_main_process():
        print_note(f"lora: {message}")
    else:
        time.sleep(FOUND_S)


def report_lost(message: str) -> None:
    """Print that another process is gone, unless it said why; then give the launcher time to look.

    A launcher that finds this process ended first would take it for the cause.
    """
    if _is_first_to_report():
        print_note(f"lora: rank {this_rank().rank}: {message}")
    time.sleep(FOUND_S)


def outlive_sigterm() -> None:
    """Ignore the SIGTERM with which a launcher ends those that lost a process: they end anyway.

    Its default would end the process before it has said anything.
    """
    if is_started_by_torchrun():
        with contextlib.suppress(ValueError):  # outside the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)


def write_error_file(message: str, stack: str = "") -> None:
    """Leave the message where torchrun looks for it; it shows the stack, or else the message."""
    path = os.environ.get(ERROR_FILE)
    if not path:
        return
    details = {"py_callstack": stack or message, "timestamp": str(int(time.time()))}
    content = {"message": {"message": message, "extraInfo": details}}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump(content, file)


def run_rank(run: Callable[[], int]) -> int:
    """Return the exit code of `run`, the whole of this process; alone, just that.

    One of several leaves at once if it failed. Python's own end would wait for connections to
    processes that never answer again.
    """
    if not is_one_of_several():
        return run()
    # Ignored under nohup; but a terminal's SIGHUP does not come here: torchrun passes on its own,
    # and kills 30 s later what has not ended.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with _Rank():
        code = run()
    if code:
        _leave(code)
    return code


class _Rank:
    """Context manager that reports an exception nobody expected, with its rank, and leaves."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, SystemExit):
            return
        if isinstance(error, RuntimeError) and is_of_connection(error):
            outlive_sigterm()
            report_lost(describe_lost(error))
            _leave(LOST_CODE)
        stack = "".join(traceback.format_exception(kind, error, trace))
        message = f"{type(error).__name__}: {error}"
        write_error_file(message, stack)
        who = _who_fails_alike(message)
        if who[0] == this_rank().rank:
            name = _named(who) or "all ranks: "
            print(f"lora: {name.rstrip()}\n{stack}", file=sys.__stderr__, end="", flush=True)
        else:
            time.sleep(FOUND_S)
        _leave(UNEXPECTED)


def _leave(code: int) -> None:
    end_output()
    os._exit(code)


def _named(ranks: list[int]) -> str:
    if len(ranks) == this_rank().size:
        return ""
    numbers = ", ".join(map(str, ranks))
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers}: "


def _who_fails_alike(message: str) -> list[int]:
    """Return the ranks that fail with this message, this one among them."""
    from lora.distributed.store import ERROR, STATE, launcher_store, read, write

    here, store = this_rank(), launcher_store()
    if store is None:
        return [here.rank]
    try:
        write(store, ERROR, here.rank, message)
        until = time.monotonic() + (MEET_JOINED_S if read(store, STATE, 0) else MEET_S)
        missing = list(range(here.size))
        while missing and time.monotonic() < until:
            time.sleep(POLL_S)
            missing = [rank for rank in missing if read(store, ERROR, rank) is None]
        return [rank for rank in range(here.size) if read(store, ERROR, rank) == message]
    except RuntimeError:  # the launcher is gone
        return [here.rank]


def _is_first_to_report() -> bool:
    """Whether nobody has reported a failure yet, and this process is the first that will."""
    from lora.distributed.store import ERROR, LOST, launcher_store, read

    here, store = this_rank(), launcher_store()
    if store is None:
        return True
    try:
        if any(read(store, ERROR, rank) for rank in range(here.size)):
            return False
        return store.compare_set(LOST, "", str(here.rank)).decode() == str(here.rank)
    except RuntimeError:
        return True


def is_of_connection(error: RuntimeError) -> bool:
    """Whether a collective raised `error` because another process does not answer."""
    text = str(error)
    kinds = {kind.__name__ for kind in type(error).__mro__}  # without an import of torch
    return "DistError" in kinds or "gloo/" in text or "NCCL" in text


def describe_lost(error: RuntimeError, what: str = "") -> str:
    """Return in words that another process does not answer, and `what` was waited for, if known."""
    is_closed = any(word in str(error) for word in ("closed by peer", "reset by peer"))
    how = "has ended" if is_closed else f"does not answer ({_first_line(error)})"
    waited = f", while this one waited for {what}" if what else ""
    return f"Another process {how}{waited}: all of them end. {GO_ON}"


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's text, of limited length."""
    text = str(error).strip().splitlines()
    return shortened(text[0], 200) if text else type(error).__name__
