"""Tokenisation in a background thread, while the caller prepares the next batch of texts.

The tokenizer runs on all cores without holding the GIL, so the caller's own work costs little time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

ResultT = TypeVar("ResultT")


class Prefetcher(Generic[ResultT]):
    """Runs `work` on batches one after the other in a thread; results are consumed in order.

    Use it in a `with` statement, whose end consumes what is left. At most two batches are in
    flight, so memory does not grow with their number. Exceptions of `work` are raised by `put` or
    at the end of the `with` statement.
    """

    def __init__(self, work: Callable[[Sequence[str]], ResultT]) -> None:
        self._work = work
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenise")
        self._pending: deque[tuple[Future[ResultT], Callable[[ResultT], None]]] = deque()

    def put(self, texts: Sequence[str], consume: Callable[[ResultT], None]) -> None:
        """Submit `texts`; `consume` gets their result, later, in the caller's own thread."""
        self._pending.append((self._pool.submit(self._work, texts), consume))
        if len(self._pending) > 1:  # the new batch is submitted before the old one is consumed
            self._consume_first()

    def __enter__(self) -> Prefetcher[ResultT]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            while kind is None and self._pending:
                self._consume_first()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def _consume_first(self) -> None:
        future, consume = self._pending.popleft()
        consume(future.result())
