"""Adapters opened by PEFT alone: by the base that they name, a directory or a GGUF file."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora.adapters.apply import apply_lora
from lora.adapters.save_load import save_adapter
from lora.config import LoRAConfig
from lora.export.gguf import export_gguf
from lora.pretrained.hf_weights import load_decoder
from lora.pretrained.sources import CACHE_VARIABLE, find_model
from tests.export.test_gguf import MakeFolder, make_folder  # noqa: F401 - a fixture

IDS = torch.tensor([[1, 7, 3, 5, 9, 200, 299]])


@pytest.fixture
def peft() -> Iterator[Any]:
    module = pytest.importorskip("peft")
    with warnings.catch_warnings():  # of PEFT itself; those about keys stay errors
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", category=UserWarning, module="transformers")
        yield module


def adapt(name: Path, folder: Path, fill_random: Callable[..., nn.Module]) -> Tensor:
    """Save an adapter for the model called `name`, and return the adapted model's logits."""
    source = find_model(str(name))
    model = apply_lora(load_decoder(source.folder), LoRAConfig(rank=4))
    fill_random(model, 5, only_trainable=True, std=0.3).eval()
    save_adapter(model, folder, base_name=source.reference)
    return logits(model)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output = model(IDS)
    return output if isinstance(output, Tensor) else output.logits


def test_auto_peft_model_finds_the_base_in_its_directory(
    make_folder: MakeFolder,  # noqa: F811
    fill_random: Callable[..., nn.Module],
    tmp_path: Path,
    peft: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(make_folder("llama").parent)
    wanted = adapt(Path("llama"), tmp_path / "adapter", fill_random)  # a relative path
    monkeypatch.chdir("/")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert (logits(theirs) - wanted).abs().max() <= 1e-5


def test_a_gguf_base_is_opened_by_transformers_and_then_adapted(
    make_folder: MakeFolder,  # noqa: F811
    fill_random: Callable[..., nn.Module],
    tmp_path: Path,
    peft: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import transformers

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    export_gguf(make_folder("llama"), tmp_path / "base.gguf", "f32")
    wanted = adapt(tmp_path / "base.gguf", tmp_path / "adapter", fill_random)
    named = peft.LoraConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path
    assert named == str(tmp_path / "base.gguf")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="base.gguf")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert (logits(theirs) - wanted).abs().max() <= 1e-5
