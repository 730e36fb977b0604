"""The device of each process, and batches that are too small for all of them."""

from __future__ import annotations

import pytest
import torch

from lora.config import TrainConfig
from lora.distributed.devices import check_batch, check_own_device, own_device
from lora.distributed.world import World
from lora.errors import ConfigError


@pytest.fixture
def third_of_four(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of rank 2 of four processes on a machine with four GPUs."""
    of_torchrun = {
        "RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    }  # fmt: skip
    for name, value in of_torchrun.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    return monkeypatch


def test_a_process_alone_has_the_device_that_was_asked_for() -> None:
    assert [own_device(name) for name in ("auto", "cpu", "cuda:1")] == ["auto", "cpu", "cuda:1"]
    check_own_device(torch.device("cuda:1"))


def test_each_of_several_processes_has_the_gpu_of_its_number(
    third_of_four: pytest.MonkeyPatch,
) -> None:
    assert [own_device(name) for name in ("auto", "cuda", "cuda:2")] == ["cuda:2"] * 3
    assert own_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match=r"device='cuda:1' with 4 processes: each takes"):
        own_device("cuda:1")
    check_own_device(torch.device("cuda:2"))
    with pytest.raises(ConfigError, match=r"on cuda:0 in the process with LOCAL_RANK=2"):
        check_own_device(torch.device("cuda:0"))
    third_of_four.setattr(torch.cuda, "device_count", lambda: 0)
    assert own_device("auto") == "cpu"


def test_more_processes_than_gpus_are_refused(third_of_four: pytest.MonkeyPatch) -> None:
    third_of_four.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ConfigError, match=r"4 processes on this machine: PyTorch sees 3 GPUs.*3"):
        own_device("auto")


@pytest.mark.parametrize(
    ("batch_size", "passes", "way"),
    [(8, 8, "gradient_accumulation=2"), (8, 4, "gradient_accumulation=2"), (3, 1, "batch_size=4")],
)
def test_each_process_needs_a_sequence(batch_size: int, passes: int, way: str) -> None:
    world = World(size=4)
    with pytest.raises(ConfigError, match=f"4 processes.*Use {way}"):
        check_batch(TrainConfig(batch_size=batch_size, gradient_accumulation=passes), world)
    check_batch(TrainConfig(batch_size=8, gradient_accumulation=2), world)
