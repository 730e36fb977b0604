"""Memory that runs out is told with what took it and what to change, and nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lora import cli
from lora.errors import TrainingError
from lora.out_of_memory import Held, advise, count_held, explained, is_out_of_memory, say_held

GB = 10**9


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to …"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        MemoryError(),
    ],
)
def test_every_way_in_which_memory_runs_out_is_known(error: Exception) -> None:
    assert is_out_of_memory(error)
    with (
        pytest.raises(TrainingError, match="Memory ran out at step 3"),
        explained(lambda: "at step 3"),
    ):
        raise error


def test_torch_itself_says_it_so() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), explained(str):
        raise RuntimeError("shapes do not match")


def test_what_is_held_is_counted() -> None:
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False).bfloat16())
    model[1].requires_grad_(False)
    held = count_held(model)
    assert held == Held(frozen_bytes=32, trained_bytes=128, state_bytes=384)
    said = say_held(Held(4 * GB, GB, 3 * GB), 10 * GB, rows=2)
    assert "4.00 GB of frozen weights" in said
    assert "the other 2.00 GB are activations of 2 rows at once" in said


@pytest.mark.parametrize(
    ("held", "sizes", "has_lora", "first", "later"),
    [
        (Held(9, 0, 0), (8, 1), True, "--micro-batches 2 instead of 1", "--max-length"),
        (Held(9, 0, 0), (6, 2), True, "--micro-batches 3 instead of 2", "2 rows at once"),
        (Held(9, 0, 0), (4, 4), True, "a shorter --max-length", "a smaller model"),
        (Held(1, 1, 3), (4, 4), True, "a shorter --max-length", "a smaller --rank"),
        (Held(0, 1, 3), (4, 1), False, "--micro-batches 2", "LoRA instead of --full"),
    ],
)
def test_the_advice_begins_with_what_costs_nothing(
    held: Held, sizes: tuple[int, int], has_lora: bool, first: str, later: str
) -> None:
    said = advise(held, batch_size=sizes[0], micro_batches=sizes[1], has_lora=has_lora)
    assert said.startswith(f"Try, in this order: {first}")
    assert later in said.partition(first)[2]
    assert "`lora plan` shows which batch fits" in said


def test_a_command_without_training_says_it_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(words: list[str]) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["generate"]) == 2
    assert "memory ran out: CUDA out of memory" in capsys.readouterr().err
    with pytest.raises(torch.OutOfMemoryError):
        cli.main(["generate", "--debug"])
