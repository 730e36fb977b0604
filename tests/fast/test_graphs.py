"""What cannot be captured as a CUDA graph; graphs themselves are tested on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from lora.fast.graphs import Graphs


class _NoDevice(Graphs):
    """Captures without a device: what the rehearsal does there is left out."""

    def __init__(self) -> None:
        super().__init__(torch.device("cuda"), torch.ones(()))
        self.is_capturing = False

    def _capture(self, key: tuple[Any, ...], function: Callable[[], Any]) -> None:
        self.is_capturing = True
        try:
            self._record(key, function)
        finally:
            self.is_capturing = False


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> _NoDevice:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: nullcontext())
    return _NoDevice()


# Torch raises the second itself, before CUDA could.
@pytest.mark.parametrize("kind", [torch.AcceleratorError, RuntimeError])
def test_a_step_that_cannot_be_captured_runs_without_a_graph(
    graphs: _NoDevice, kind: type[RuntimeError], caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def step() -> None:
        if graphs.is_capturing:
            raise kind("Cannot copy between CPU and CUDA tensors during CUDA graph capture")
        calls.append(1)

    with caplog.at_level(logging.WARNING):
        graphs.run(("step",), step)
        graphs.run(("step",), step)
    assert calls == [1, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "The step runs without a CUDA graph, which is slower: the model's code cannot be captured. "
        "Cannot copy between CPU and CUDA tensors during CUDA graph capture"
    ]


def test_memory_that_runs_out_in_a_capture_is_no_reason_against_graphs(graphs: _NoDevice) -> None:
    def step() -> None:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        graphs.run(("step",), step)
    assert graphs.why_not is None
