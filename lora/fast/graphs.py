"""CUDA graphs by key: captured when they are first asked for, replayed afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP_PASSES = 2


class Graphs:
    """Runs functions, on a GPU as graphs that share one pool of memory.

    Args:
        device: where the functions compute; without CUDA they are simply called.
        is_live: a flag on the device that is False while a function is only rehearsed: passes
            before the capture compile kernels and are to change nothing.
    """

    def __init__(self, device: torch.device, is_live: Tensor) -> None:
        self.device, self.is_live = device, is_live
        self.why_not: str | None = None
        """Why there are no graphs, if a capture failed."""
        self.captures = True
        """False where launches are nothing beside what they launch: then nothing is rehearsed."""
        self._graphs: dict[tuple[Any, ...], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def run(self, key: tuple[Any, ...], function: Callable[[], Any]) -> None:
        """Call `function`, or replay what it launched when `key` was new.

        What cannot be captured, because the host looks at a value in it, is called each time.
        """
        captures = self.captures and self.why_not is None and self.device.type == "cuda"
        if captures and key not in self._graphs:
            self._capture(key, function)
        if key in self._graphs:
            self._graphs[key].replay()
        else:
            function()

    def has(self, key: tuple[Any, ...]) -> bool:
        """Whether `run` of this key replays."""
        return key in self._graphs

    def clear(self) -> None:
        """Forget all graphs: what they read or write is about to move."""
        self._graphs.clear()
        self._pool = None

    def _capture(self, key: tuple[Any, ...], function: Callable[[], Any]) -> None:
        self.is_live.fill_(False)
        drawn = torch.cuda.get_rng_state(self.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_PASSES):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.set_rng_state(drawn, self.device)  # a rehearsal draws nothing
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                function()
        except torch.AcceleratorError as error:
            self.clear()
            self.why_not = str(error).splitlines()[0]
        else:
            self._pool = self._pool or graph.pool()
            self._graphs[key] = graph
        self.is_live.fill_(True)
