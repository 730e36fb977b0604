"""A folder in 4 bits on a GPU: the values of a CPU, and the hand-written step over a mixed one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lora
from lora.decoder.quantised.base import quantised_modules
from lora.kernels.step.jit import HAS_TRITON
from lora.pretrained.hf_weights import load_decoder, save_decoder
from lora.runs.disk import read_json, read_rows
from tests.pretrained.quantised.four_bit import write_4bit_ourselves

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and HAS_TRITON), reason="needs a CUDA device and Triton"
    ),
]


@pytest.fixture(scope="module")
def four(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in 4 bits, but for the second block's feed-forward."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bnb-4bit"
    write_4bit_ourselves(tiny_folder, folder, skipped=lambda name: "layers.1.mlp" in name)
    return folder


def test_values_are_those_of_a_cpu(four: Path) -> None:
    on_cpu, on_gpu = (load_decoder(four, dtype=torch.bfloat16, device=d) for d in ("cpu", "cuda"))
    there = quantised_modules(on_gpu)
    assert all(parameter.is_cuda for parameter in on_gpu.parameters())
    for name, layer in quantised_modules(on_cpu).items():
        assert torch.equal(there[name].unpacked().cpu(), layer.unpacked())


@pytest.mark.parametrize("memory", ["none", "full"])
def test_it_trains_as_over_the_same_values_unpacked(
    four: Path, tiny_folder: Path, orders_file: Path, tmp_path: Path, memory: str
) -> None:
    twin = load_decoder(tiny_folder, dtype=torch.bfloat16)
    for name, layer in quantised_modules(load_decoder(four, dtype=torch.bfloat16)).items():
        twin.get_submodule(name).weight = torch.nn.Parameter(layer.unpacked())
    save_decoder(twin, tmp_path / "plain")
    for path in tiny_folder.iterdir():  # with the tokenizer
        if not (tmp_path / "plain" / path.name).exists():
            (tmp_path / "plain" / path.name).write_bytes(path.read_bytes())
    settings: dict[str, Any] = {"steps": 6, "batch_size": 2, "rank": 4, "max_length": 128}
    found = []
    for name, model in (("four", four), ("plain", tmp_path / "plain")):
        done = lora.finetune(
            str(orders_file),
            model=str(model),
            out=str(tmp_path),
            name=name,
            memory=memory,
            device="cuda",
            **settings,
        )
        rows = read_rows(done.folder / "metrics.jsonl")
        found.append([row["loss"] for row in rows if "loss" in row])
        assert read_json(done.folder / "run.json").get("base_dtype") == (
            "nf4" if name == "four" else None
        )
    assert found[0] == pytest.approx(found[1], rel=1e-3)
