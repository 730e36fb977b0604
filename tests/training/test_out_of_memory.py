"""Running out of memory is reported with what used it and what to change; nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lora import cli
from lora.config import TrainConfig
from lora.errors import TrainingError
from lora.training.out_of_memory import (
    MemoryCount,
    advise,
    count_parts,
    describe_parts,
    explain_out_of_memory,
    is_out_of_memory,
)

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
        explain_out_of_memory(lambda: "at step 3"),
    ):
        raise error


def test_torch_itself_says_it_so() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), explain_out_of_memory(str):
        raise RuntimeError("shapes do not match")


def test_what_is_held_is_counted() -> None:
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False).bfloat16())
    model[1].requires_grad_(False)
    parts = count_parts(model, 1000)
    assert parts == MemoryCount(weights=160, gradients=128, optimizer=256, activations=456)
    assert parts.total == 1000
    said = describe_parts(MemoryCount(4 * GB, GB, 2 * GB, 3 * GB))
    assert said.startswith("10.00 GB (weights 4.00, gradients 1.00, optimizer 2.00, activations")


@pytest.mark.parametrize(
    ("parts", "sizes", "has_lora", "most", "ways"),
    [
        (
            (2, 0, 0, 8), (8, 1), True, "activations and loss of 8 sequences at once",
            (
                "--gradient-accumulation 2 instead of 1",
                "4 sequences at once and about 6",
                "--max-length",
            ),
        ),
        (
            (1, 0, 0, 9), (6, 2), True, "activations and loss of 3 sequences at once",
            ("--gradient-accumulation 3 instead of 2", "2 sequences at once and about 7.00 GB"),
        ),
        ((2, 0, 0, 8), (4, 4), True, "1 sequence at once", ("a shorter --max-length", "a smaller")),
        ((2, 2, 4, 2), (4, 4), True, "gradients and moments", ("--max-length", "--rank")),
        ((2, 2, 4, 2), (4, 4), False, "gradients and moments", ("LoRA instead of --full",)),
        ((9, 1, 0, 0), (4, 1), True, "the weights", ("a smaller model or a device",)),
    ],
)  # fmt: skip
def test_the_advice_is_of_what_took_most_and_begins_with_what_costs_nothing(
    parts: tuple[int, ...],
    sizes: tuple[int, int],
    has_lora: bool,
    most: str,
    ways: tuple[str, ...],
) -> None:
    counted = MemoryCount(*(part * GB for part in parts))
    said = advise(
        counted, TrainConfig(batch_size=sizes[0], gradient_accumulation=sizes[1]), has_lora=has_lora
    )
    assert said.startswith("Most of it: ")
    assert most in said.partition(". Try")[0]
    rest = said.partition(". Try, in this order: ")[2]
    for way in ways:
        assert way in rest
        rest = rest.partition(way)[2]
    assert "`lora plan` shows which batch fits" in said


def test_leaner_memory_modes_come_first() -> None:
    leaner = (("full", 4 * GB), ("full+offload", 3 * GB))
    counted = MemoryCount(2 * GB, 0, 0, 8 * GB, leaner_modes=leaner)
    said = advise(counted, TrainConfig(batch_size=8), has_lora=True)
    first = "--memory full (about 4.00 GB); --memory full+offload (about 3.00 GB); "
    assert f"Try, in this order: {first}" in said
    assert said.index("--max-length") < said.index("a smaller model")


def test_a_base_in_4_bits_is_advised_after_what_keeps_the_result() -> None:
    counted = MemoryCount(6 * GB, 0, 0, 2 * GB, nf4_saving=4 * GB)
    said = advise(counted, TrainConfig(batch_size=8), has_lora=True)
    rounded = "--base-dtype nf4 (frozen weights rounded to 4 bits, about 4.00 GB)"
    assert f"about 7.00 GB); {rounded}; a shorter --max-length" in said
    for saving in (0, GB // 10):  # nothing to pack, or too little to matter
        counted = MemoryCount(6 * GB, 0, 0, 2 * GB, nf4_saving=saving)
        assert "nf4" not in advise(counted, TrainConfig(), has_lora=True)


@pytest.mark.parametrize(
    ("parts", "given", "n_gpus", "has_lora", "ways"),
    [
        (  # a batch that several GPUs share
            MemoryCount(2 * GB, 0, 0, 8 * GB), (8, 1), 4, True,
            ("--devices 4 (the result stays the same, with 2 sequences at once on each and about "
             "4.00 GB)", "--gradient-accumulation 2 instead of 1"),
        ),
        (  # weights that are more than the rest, and a micro-batch of fewer sequences than GPUs
            MemoryCount(9 * GB, 0, 0, GB), (8, 8), 4, True,
            ("--devices 4 --gradient-accumulation 2 --parallel fsdp (each of 4 devices has a part "
             "of the frozen weights)",),
        ),
        (  # several devices already
            MemoryCount(9 * GB, 0, 0, 3 * GB, devices=2, parallel="ddp"), (8, 1), 4, True,
            ("--parallel fsdp (each of 2 devices", "--gradient-accumulation 2 instead of 1 (the "
             "result stays the same, with 2 sequences at once and about 10.50 GB)",
             "a device with more memory, or more of them with --devices"),
        ),
        (
            MemoryCount(2 * GB, 2 * GB, 4 * GB, GB, devices=2, parallel="ddp"), (2, 1), 2, False,
            ("--parallel fsdp (each of 2 devices has a part of the weights, gradients and moments)",
             "LoRA instead of --full"),
        ),
        (MemoryCount(9 * GB, 0, 0, GB), (8, 8), 1, True, ("or more of them with --devices",)),
    ],
)  # fmt: skip
def test_several_devices_are_advised_where_they_help(
    parts: MemoryCount,
    given: tuple[int, int],
    n_gpus: int,
    has_lora: bool,
    ways: tuple[str, ...],
) -> None:
    config = TrainConfig(batch_size=given[0], gradient_accumulation=given[1])
    rest = advise(parts, config, has_lora=has_lora, n_gpus=n_gpus).partition("in this order: ")[2]
    for way in ways:
        assert way in rest
        rest = rest.partition(way)[2]


def test_several_devices_are_not_advised_where_they_do_not_help() -> None:
    of_weights = MemoryCount(9 * GB, 0, 0, GB)
    one = TrainConfig(batch_size=1)
    assert "--devices" not in advise(of_weights, one, has_lora=True, n_gpus=4)
    assert "--devices" not in advise(of_weights, TrainConfig(), has_lora=True)  # on a CPU
    sharded = MemoryCount(9 * GB, 0, 0, 9 * GB, devices=2, parallel="fsdp")
    said = advise(sharded, TrainConfig(batch_size=2), has_lora=True)
    assert "--parallel" not in said
    # Each device has at least one sequence of a pass.
    assert "--gradient-accumulation" not in said
    assert "of 1 sequence at once" in said or "the weights" in said


def test_what_would_not_help_is_left_out() -> None:
    said = advise(MemoryCount(9 * GB, 0, 0, GB // 2), TrainConfig(batch_size=8), has_lora=True)
    assert "--gradient-accumulation" not in said
    assert "--max-length" not in said


def test_a_command_without_training_says_it_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(words: list[str]) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["generate"]) == 2
    assert "lora: out of memory: CUDA out of memory" in capsys.readouterr().err
    with pytest.raises(torch.OutOfMemoryError):
        cli.main(["generate", "--debug"])
