"""The device, the compute dtype, and the reasons for them."""

from __future__ import annotations

import os

import pytest
import torch

from lora import device
from lora.device import FORCE_BF16, choose_device, count_outside, peak_memory_bytes
from lora.errors import ConfigError


def test_a_cpu_computes_in_fp32_and_says_why() -> None:
    choice = choose_device("cpu")
    assert choice.device.type == "cpu"
    assert choice.compute_dtype is torch.float32
    assert "fp32" in choice.reason
    with choice.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32


def test_bf16_on_a_cpu_is_refused_unless_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FORCE_BF16, raising=False)
    with pytest.raises(ConfigError, match=r"tens of times slower.*LORALM_FORCE_BF16=1"):
        choose_device("cpu", "bf16")
    monkeypatch.setenv(FORCE_BF16, "1")
    choice = choose_device("cpu", "bf16")
    with choice.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("device", "precision", "seen"),
    [("cpux", "auto", "device='cpux'"), ("cpu", "fp16", "Allowed: auto, fp32, bf16"),
     ("meta", "auto", "Allowed: auto, cpu"), ("cuda:99", "auto", "CUDA devices")],
)  # fmt: skip
def test_what_is_not_there_is_named(device: str, precision: str, seen: str) -> None:
    with pytest.raises(ConfigError, match=seen):
        choose_device(device, precision)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_a_gpu_without_bf16_units_computes_in_fp32_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(FORCE_BF16, raising=False)
    pretend_gpu(monkeypatch, (7, 5))
    choice = choose_device()
    assert (choice.device.type, choice.compute_dtype) == ("cuda", torch.float32)
    assert "Tesla T4 (capability 7.5) has no bf16 tensor cores" in choice.reason
    with pytest.raises(ConfigError, match=r"no bf16 tensor cores.*Use precision='fp32'"):
        choose_device("cuda", "bf16")
    with pytest.raises(ConfigError, match="Allowed: auto, fp32, bf16"):
        choose_device("cuda", "fp16")
    pretend_gpu(monkeypatch, (8, 0))
    assert choose_device().compute_dtype is torch.bfloat16


@pytest.mark.parametrize("is_there", [True, False])
def test_apples_gpus_are_refused_with_the_reason_and_never_chosen(
    monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: is_there)
    for name in ("mps", "mps:0"):
        with pytest.raises(ConfigError, match=r"have no fp64.*Use device=cpu"):
            choose_device(name)
    assert choose_device("auto").device.type == "cpu"


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(40_000_000)  # 160 MB
    after = peak_memory_bytes(torch.device("cpu"))
    assert held.sum() > 0
    assert 50e6 < before < 20e9
    assert after >= before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_with_bf16_units_uses_them() -> None:
    choice = choose_device("auto")
    assert choice.device.type == "cuda"
    assert choice.compute_dtype is torch.bfloat16
    assert choose_device("cuda", "fp32").compute_dtype is torch.float32


def test_deterministic_algorithms_are_on_inside_and_as_before_outside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(device.CUBLAS_VARIABLE, raising=False)
    with device.deterministic_algorithms():
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ[device.CUBLAS_VARIABLE] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv(device.CUBLAS_VARIABLE, ":16:8")
    with device.deterministic_algorithms():
        assert os.environ[device.CUBLAS_VARIABLE] == ":16:8"


def test_memory_of_another_allocator_is_counted_while_it_exists(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 100)
    outside = torch.empty(7, dtype=torch.uint8)
    count_outside(outside)
    assert peak_memory_bytes(torch.device("cuda")) == 107
    del outside
    assert peak_memory_bytes(torch.device("cuda")) == 100
