"""The device and the number format, and why."""

from __future__ import annotations

import pytest
import torch

from lora.device import FORCE_BF16, choose_device, peak_memory_bytes
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
    [("cpux", "auto", "device='cpux'"), ("cpu", "fp16", "allowed are auto, fp32, bf16"),
     ("meta", "auto", "allowed are auto, cpu"), ("cuda:99", "auto", "CUDA devices")],
)  # fmt: skip
def test_what_is_not_there_is_named(device: str, precision: str, seen: str) -> None:
    with pytest.raises(ConfigError, match=seen):
        choose_device(device, precision)


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
