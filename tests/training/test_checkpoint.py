"""Checkpoints: whole, checksummed, exact."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora.config import TrainConfig
from lora.device import choose_device
from lora.errors import CheckpointError
from lora.training.checkpoint import (
    OPTIMIZER_KEYS,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    save_checkpoint,
)
from lora.training.plain_step import PlainStepRunner

TENSORS = {"a": torch.arange(3.0)}


def summed(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    return model(batch).sum()[None], torch.tensor([len(batch)])


def untrained(model: nn.Module) -> PlainStepRunner:
    return PlainStepRunner(model, summed, choose_device("cpu"), TrainConfig())


def trained(seed: int) -> tuple[nn.Linear, PlainStepRunner]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    steps = untrained(model)
    steps.launch(1, [torch.ones(1, 3)], [0.1])
    return model, steps


def test_it_comes_back_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, TENSORS, {"note": "x"}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    tensors, state = load_newest(tmp_path, print)
    assert torch.equal(tensors["a"], TENSORS["a"])
    assert state == {"note": "x", "step": 3}
    assert {path.name for path in tmp_path.iterdir()} == {"step-000002", "step-000003"}


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "state"])
def test_a_damaged_one_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, damage: str
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, TENSORS, {}, keep=2)
    newest = tmp_path / "step-000002"
    file = newest / ("state.json" if damage == "state" else "tensors.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(data[:-1])
    else:
        data[-2] ^= 1
        file.write_bytes(data)
    said: list[str] = []
    assert load_newest(tmp_path, said.append)[1]["step"] == 1
    assert len(said) == 1
    assert "step-000002" in said[0]
    with pytest.raises(CheckpointError):
        load_checkpoint(newest)


def test_without_a_whole_one_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load_newest(tmp_path, print)


def test_a_full_disk_leaves_the_former_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, TENSORS, {}, keep=1)

    def refuse(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match=r"step 2; earlier ones are unt.*Free some space"):
        save_checkpoint(tmp_path, 2, TENSORS, {}, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000001"}
    assert load_newest(tmp_path, print)[1]["step"] == 1


@pytest.fixture
def read_only_folder() -> Iterator[Path]:
    """A checkpoints' folder with one checkpoint in it, that this process may not write to."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own is closed to other users
        folder = Path(name) / "checkpoints"
        save_checkpoint(folder, 1, TENSORS, {}, keep=1)
        Path(name).chmod(0o755)
        folder.chmod(0o555)
        is_root = os.geteuid() == 0
        if is_root:  # root may write anywhere: be somebody else
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if is_root:
                os.seteuid(0)
            folder.chmod(0o755)


def test_a_read_only_folder_is_named_and_keeps_what_it_has(read_only_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step 2; earlier.*Make the directory writable"):
        save_checkpoint(read_only_folder, 2, TENSORS, {}, keep=1)
    assert [path.name for path in read_only_folder.iterdir()] == ["step-000001"]
    assert load_newest(read_only_folder, print)[1]["step"] == 1


def test_a_file_in_the_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match=r"checkpoints: .*A file is in the way"):
        save_checkpoint(tmp_path / "checkpoints", 1, TENSORS, {}, keep=1)
    assert (tmp_path / "checkpoints").read_text() == ""


def test_a_folder_that_vanishes_during_the_save_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    save_checkpoint(folder, 1, TENSORS, {}, keep=1)
    whole = {path.name: path.read_bytes() for path in (folder / "step-000001").iterdir()}
    sync = os.fsync

    def remove_and_sync(handle: int) -> None:
        sync(handle)
        shutil.rmtree(folder / ".step-000002.building", ignore_errors=True)

    monkeypatch.setattr(os, "fsync", remove_and_sync)
    with pytest.raises(CheckpointError, match=r"step 2; earlier.*no longer exists"):
        save_checkpoint(folder, 2, TENSORS, {}, keep=1)
    assert {p.name: p.read_bytes() for p in (folder / "step-000001").iterdir()} == whole


def test_a_save_that_was_killed_halfway_is_ignored_and_cleared_away(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, TENSORS, {}, keep=2)
    (tmp_path / ".step-000002.building").mkdir()
    (tmp_path / ".step-000002.building" / "tensors.safetensors").write_bytes(b"half")
    (tmp_path / "step-000003").mkdir()  # without a manifest
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001"]
    save_checkpoint(tmp_path, 2, TENSORS, {}, keep=2)
    assert load_newest(tmp_path, print)[1]["step"] == 2
    assert not (tmp_path / ".step-000002.building").exists()


def test_a_run_resumed_before_a_damaged_one_does_not_lose_its_next_save_to_it(
    tmp_path: Path,
) -> None:
    for step in (1, 3):
        save_checkpoint(tmp_path, step, TENSORS, {}, keep=2)
    (tmp_path / "step-000003" / "tensors.safetensors").write_bytes(b"")
    assert load_newest(tmp_path, lambda text: None)[1]["step"] == 1
    save_checkpoint(tmp_path, 2, TENSORS, {}, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002"]
    assert load_newest(tmp_path, print)[1]["step"] == 2


def test_a_million_steps_are_newer_than_fewer(tmp_path: Path) -> None:
    for step in (999_998, 999_999, 1_000_000):
        save_checkpoint(tmp_path, step, TENSORS, {}, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1000000"]
    assert load_newest(tmp_path, print)[1]["step"] == 1_000_000


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"tensors.safetensors": 3}', "\0"])
def test_a_damaged_manifest_falls_back_too(tmp_path: Path, content: str) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, TENSORS, {}, keep=2)
    (tmp_path / "step-000002" / "manifest.json").write_text(content)
    said: list[str] = []
    assert load_newest(tmp_path, said.append)[1]["step"] == 1
    assert len(said) == 1
    assert "step-000002" in said[0]


def test_a_step_saved_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, TENSORS, {"note": "first"}, keep=2)
    save_checkpoint(tmp_path, 1, {"a": torch.ones(2)}, {"note": "second"}, keep=2)
    tensors, state = load_newest(tmp_path, print)
    assert state["note"] == "second"
    assert tensors["a"].tolist() == [1, 1]


def test_parameters_moments_and_randomness_come_back_to_the_bit(tmp_path: Path) -> None:
    model, steps = trained(1)
    save_checkpoint(tmp_path, 1, steps.state(), {}, keep=1)
    drawn = torch.rand(3)
    other, other_steps = trained(2)
    other_steps.restore(load_newest(tmp_path, print)[0], step=1)
    assert torch.equal(torch.rand(3), drawn)
    assert torch.equal(other.weight, model.weight)
    moments, others = (
        s.optimizer.state[m.weight] for s, m in ((steps, model), (other_steps, other))
    )
    assert moments.keys() == others.keys() == {"step", "exp_avg", "exp_avg_sq"}
    for key, moment in moments.items():
        assert torch.equal(others[key], moment)


def test_names_in_a_checkpoint_are_those_of_parameters_and_of_adamw() -> None:
    names = [f"{kind}.{name}" for kind in OPTIMIZER_KEYS for name in ("weight", "bias")]
    tensors = trained(1)[1].state()
    assert {name for name in tensors if not name.startswith("random.")} == {
        "model.weight",
        "model.bias",
        *(f"optimizer.{name}" for name in names),
    }
    assert "random.cpu" in tensors


def test_a_checkpoint_of_another_model_is_refused_with_every_difference() -> None:
    tensors = trained(1)[1].state()
    other = untrained(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)))
    with pytest.raises(CheckpointError, match=r"(?s)missing: 0\.weight.*not trained here: weight"):
        other.restore(tensors, step=1)
    wider = untrained(nn.Linear(4, 2))
    with pytest.raises(CheckpointError, match=r"\(2, 3\) saved, \(2, 4\) here"):
        wider.restore(tensors, step=1)
