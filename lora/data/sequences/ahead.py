"""Tokenising beside the caller: while one batch of texts is tokenised, the next one is prepared.

The tokenizer works on all cores without Python's lock, so the caller's own work costs little time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

ResultT = TypeVar("ResultT")


class Ahead(Generic[ResultT]):
    """Runs `work` on one batch after the other in a thread; results are taken in their order.

    Use it in a `with` statement, whose end takes what is left. At most two batches wait at once,
    so memory stays as it is however many there are. What `work` raises comes out of `put` or of
    the end of the `with` statement.
    """

    def __init__(self, work: Callable[[Sequence[str]], ResultT]) -> None:
        self._work = work
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenise")
        self._waiting: deque[tuple[Future[ResultT], Callable[[ResultT], None]]] = deque()

    def put(self, texts: Sequence[str], take: Callable[[ResultT], None]) -> None:
        """Begin with `texts`; `take` gets their result, later, in the caller's own thread."""
        self._waiting.append((self._pool.submit(self._work, texts), take))
        if len(self._waiting) > 1:  # the new batch is begun before the old one is dealt with
            self._take_first()

    def __enter__(self) -> Ahead[ResultT]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            while kind is None and self._waiting:
                self._take_first()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def _take_first(self) -> None:
        future, take = self._waiting.popleft()
        take(future.result())
