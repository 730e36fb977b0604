"""Folders in 4 bits whose model transformers runs: packed as they are stored, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora.adapters.apply import apply_lora
from lora.config import BaseWeights, LoRAConfig
from lora.decoder.quantised.base import quantised_modules
from lora.errors import ConfigError, ModelError
from lora.layers.conv1d import is_conv1d
from lora.pretrained.load.models import (
    empty_language_model,
    load_language_model,
    model_config,
    quantise_empty_model,
)
from lora.pretrained.load.task import planned_base
from lora.pretrained.transformers_models.four_bit import PackedWeights
from lora.pretrained.transformers_models.load import load_transformers_model
from tests.pretrained.quantised.four_bit import write_4bit
from tests.pretrained.tiny_models import save_tiny_transformers, tiny_multimodal

pytest.importorskip("transformers")
IDS = torch.arange(1, 10)[None]


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "llama"])
def test_values_and_logits_are_those_of_the_unpacked_model(tmp_path: Path, name: str) -> None:
    plain = save_tiny_transformers(name, tmp_path / "plain")
    is_gpt2 = name == "gpt2"
    values = write_4bit(
        plain, tmp_path / "four", transposed=is_gpt2, skipped=lambda name: "1.mlp" in name
    )
    model = load_language_model(tmp_path / "four", implementation="transformers")
    packed = quantised_modules(model)
    assert packed
    assert not [name for name in packed if "1.mlp" in name]
    twin = load_transformers_model(plain)
    for module, layer in packed.items():
        assert torch.equal(layer.unpacked(), values[f"{module}.weight"])
        linear = twin.get_submodule(module)
        with torch.no_grad():
            unpacked = layer.unpacked()
            linear.weight.copy_(unpacked.T if is_conv1d(linear) else unpacked)
    assert torch.allclose(model(IDS), twin(IDS), rtol=1e-4, atol=1e-5)
    assert "quantization_config" not in model.config.source
    if is_gpt2 or name == "llama":  # the native decoder has the very same values
        native = quantised_modules(load_language_model(tmp_path / "four"))
        assert native.keys() == packed.keys()
        assert all(torch.equal(native[n].unpacked(), packed[n].unpacked()) for n in native)
    apply_lora(model, LoRAConfig(rank=2, init_seed=0))
    model(IDS).sum().backward()


def test_other_matrices_are_unpacked_and_other_settings_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = save_tiny_transformers("gpt_neox", tmp_path / "plain")
    values = write_4bit(plain, tmp_path / "four", also=("embed_out.weight",))
    assert "quantization_config" not in model_config(tmp_path / "four").source
    model = load_language_model(tmp_path / "four")
    assert torch.equal(model.output_head().weight, values["embed_out.weight"])
    assert "unpacked, no linears of the blocks for text: " in caplog.text
    with pytest.raises(ConfigError, match="base_dtype='fp8'"):
        load_language_model(tmp_path / "four", base=BaseWeights("fp8"))


@pytest.mark.parametrize("is_whole", [False, True])
def test_the_text_part_of_a_multimodal_model(tmp_path: Path, is_whole: bool) -> None:
    """Its tower for images is plain, or packed too: then it is unpacked."""
    tiny_multimodal().save_pretrained(tmp_path / "plain")
    values = write_4bit(
        tmp_path / "plain", tmp_path / "four", skipped=lambda n: "vision" in n and not is_whole
    )
    model = load_language_model(tmp_path / "four")
    assert len(quantised_modules(model)) == 14
    planned = empty_language_model(model_config(tmp_path / "four", "auto"))
    quantise_empty_model(planned, *planned_base(tmp_path / "four", BaseWeights()))
    assert quantised_modules(planned).keys() == quantised_modules(model).keys()
    assert torch.isfinite(model(IDS)).all()
    tower = {name: p for name, p in model.named_parameters() if "vision" in name and p.dim() == 2}
    expected = {name.split("vision")[1]: v for name, v in values.items() if "vision" in name}
    for name, parameter in tower.items():
        assert torch.equal(parameter, expected[name.split("vision")[1]]), name


def test_experts_in_4_bits_are_refused_before_they_are_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = save_tiny_transformers("olmoe", tmp_path / "plain")
    write_4bit(plain, tmp_path / "four", skipped=lambda name: "router" in name or "gate." in name)
    monkeypatch.setattr(PackedWeights, "state_dict", None)  # nothing is handed to transformers
    with pytest.raises(ModelError) as raised:
        load_language_model(tmp_path / "four")
    for word in ("mlp.experts.3.up_proj.weight is in 4 bits", "--base-dtype nf4"):
        assert word in str(raised.value)
    assert "q_proj" not in str(raised.value)
