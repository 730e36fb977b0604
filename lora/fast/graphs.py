"""CUDA graphs by key: captured when they are first asked for, replayed afterwards.

A replay launches all kernels of a step at once, so the GPU never waits for the host between two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora.terminal import escaping_log

log = escaping_log(__name__)

WARM_UP_PASSES = 2
"""Before a capture: kernels compile and libraries set up, which a capture must not do."""


class Graphs:
    """Runs functions, on a GPU as CUDA graphs that share one memory pool.

    Args:
        device: where the functions compute; without CUDA they are simply called.
        is_live: a flag on the device that is False while a function is rehearsed: warm-up passes
            must change no parameter.
    """

    def __init__(self, device: torch.device, is_live: Tensor) -> None:
        self.device, self.is_live = device, is_live
        self.why_not: str | None = None
        """Why there are no graphs, if a capture failed."""
        self.captures = True
        """False where launch gaps are negligible: then nothing is rehearsed or captured."""
        self._graphs: dict[tuple[Any, ...], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def run(self, key: tuple[Any, ...], function: Callable[[], Any]) -> bool:
        """Call `function`, or replay what it launched when `key` was new.

        What cannot be captured, because it reads a value back to the host, is called each time.
        Returns whether `function` was rehearsed first: it has then run more than once.
        """
        captures = self.captures and self.why_not is None and self.device.type == "cuda"
        is_new = captures and key not in self._graphs
        if is_new:
            self._capture(key, function)
        if key in self._graphs:
            self._graphs[key].replay()
        else:
            function()
        return is_new

    def accumulate(
        self,
        n_passes: int,
        run_pass: Callable[[int], bool],
        rewind: Callable[[], None] = lambda: None,
    ) -> None:
        """Call `run_pass` with 0 … `n_passes` − 1: the first replaces sums, the others add to them.

        It returns what `run` did. A pass that adds and was rehearsed has added too often: then all
        run again, after `rewind`.
        """
        while any([run_pass(index) for index in range(n_passes)][1:]):
            rewind()

    def has(self, key: tuple[Any, ...]) -> bool:
        """Whether `run` of this key replays."""
        return key in self._graphs

    def clear(self) -> None:
        """Forget all graphs: what they read or write is about to move."""
        self._graphs.clear()
        self._pool = None  # its memory is free for the tensors to come

    def _capture(self, key: tuple[Any, ...], function: Callable[[], Any]) -> None:
        drawn, current = torch.cuda.get_rng_state(self.device), torch.cuda.current_stream()
        self.is_live.fill_(False)
        try:
            self._rehearse(function)
            torch.cuda.set_rng_state(drawn, self.device)  # as if the rehearsal had drawn nothing
            self._record(key, function)
        finally:
            # Where memory runs out, a smaller step is tried next: all is as it was.
            torch.cuda.set_stream(current)
            torch.cuda.set_rng_state(drawn, self.device)
            self.is_live.fill_(True)

    def _rehearse(self, function: Callable[[], Any]) -> None:
        # On a side stream, as torch asks of what runs before a capture.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_PASSES):
                function()
        torch.cuda.current_stream().wait_stream(stream)

    def _record(self, key: tuple[Any, ...], function: Callable[[], Any]) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # CUDA's own are AcceleratorErrors, which are RuntimeErrors
            if isinstance(error.__context__, torch.OutOfMemoryError):
                # Memory ran out inside the capture, which therefore could not be ended.
                raise error.__context__ from None
            # CUDA refuses whatever synchronises inside a capture, torch what copies from memory
            # that is not pinned. The step is called from now on: another fault will show there.
            self.clear()
            self.why_not = (str(error) or type(error).__name__).splitlines()[0]
            log.warning(
                "The step runs without a CUDA graph, which is slower: the model's code cannot be "
                "captured. %s",
                self.why_not,
            )
        else:
            # One pool: graphs run one after the other, so they may reuse each other's memory.
            self._pool = self._pool or graph.pool()
            self._graphs[key] = graph
