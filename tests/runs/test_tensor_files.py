"""Tensors written one at a time: what safetensors reads, to the bit."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora.runs.tensor_files import digest_file, write_tensors

KINDS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    drawn = {
        f"{kind}".removeprefix("torch."): torch.randint(0, 2, (3, 5), generator=draw).to(kind)
        for kind in KINDS
    }
    whole = torch.randn(6, 4, generator=draw)
    return {
        **drawn,
        "größe": whole,
        "transposed": whole.T,
        "a part": whole[2:4, 1],
        "one": torch.tensor(3.5),
        "none": torch.empty(0, 3),
    }


def test_safetensors_reads_the_same(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors, {"format": "pt"})
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_digest_is_the_files(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "x.safetensors"
    digest = write_tensors(path, tensors)
    data = path.read_bytes()
    assert (digest.n_bytes, digest.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert digest_file(path) == digest


def test_bytes_depend_on_content_alone(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    backwards = dict(reversed(tensors.items()))
    one = write_tensors(tmp_path / "a", tensors)
    assert write_tensors(tmp_path / "b", backwards) == one
    assert write_tensors(tmp_path / "c", {**tensors, "one": torch.tensor(4.0)}) != one


def test_it_is_as_large_as_theirs(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    contiguous = {name: t.contiguous().clone() for name, t in tensors.items()}
    save_file(contiguous, tmp_path / "theirs")
    ours = write_tensors(tmp_path / "ours", tensors)
    assert abs(ours.n_bytes - (tmp_path / "theirs").stat().st_size) <= 8 * len(tensors)
