"""Checkpoints: whole, checksummed, exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lora.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_newest,
    restore_training_tensors,
    save_checkpoint,
    training_tensors,
)
from lora.errors import CheckpointError
from lora.optim import build_optimizer

TENSORS = {"a": torch.arange(3.0)}


def trained(seed: int) -> tuple[nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, 0.1, 0.0)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


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
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        load_newest(tmp_path, print)


def test_a_failed_save_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, TENSORS, {}, keep=1)

    def refuse(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora.checkpoint.atomic_write", refuse)
    with pytest.raises(CheckpointError, match=r"step 2 could not be written.*untouched"):
        save_checkpoint(tmp_path, 2, TENSORS, {}, keep=1)
    assert load_newest(tmp_path, print)[1]["step"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"step-000001"}


def test_parameters_moments_and_randomness_come_back_to_the_bit(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    save_checkpoint(tmp_path, 1, training_tensors(model, optimizer), {}, keep=1)
    drawn = torch.rand(3)
    other, other_optimizer = trained(2)
    restore_training_tensors(other, other_optimizer, load_newest(tmp_path, print)[0])
    assert torch.equal(torch.rand(3), drawn)
    assert torch.equal(other.weight, model.weight)
    for key in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(
            other_optimizer.state[other.weight][key], optimizer.state[model.weight][key]
        )


def test_a_checkpoint_of_another_model_is_refused_with_every_difference() -> None:
    model, optimizer = trained(1)
    tensors = training_tensors(model, optimizer)
    other = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"(?s)missing: 0\.weight.*not trained here: weight"):
        restore_training_tensors(other, build_optimizer(other, 0.1, 0.0), tensors)
    wider = nn.Linear(4, 2)
    with pytest.raises(CheckpointError, match=r"\(2, 3\) saved, \(2, 4\) here"):
        restore_training_tensors(wider, build_optimizer(wider, 0.1, 0.0), tensors)
