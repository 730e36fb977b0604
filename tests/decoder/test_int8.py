"""A base with int8 linears: its values, its gradients, merging, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora.adapters.apply import apply_lora
from lora.adapters.fingerprint import base_fingerprint
from lora.adapters.merge import merge_lora
from lora.config import BaseWeights, LoRAConfig
from lora.decoder.decoder import Decoder
from lora.decoder.quantised import row_scaled
from lora.decoder.quantised.base import QuantisedWeight, quantised_modules
from lora.decoder.quantised.int8 import Int8Linear
from lora.errors import ModelError, TargetError
from lora.kernels import int8
from lora.kernels.int8 import quantise_int8
from lora.pretrained.hf_weights import load_decoder, save_decoder
from tests.finetune.tiny_models import save_tiny

IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
INT8 = BaseWeights("int8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny", "llama")  # with biases


def a_layer(model: Decoder) -> QuantisedWeight:
    return quantised_modules(model)["model.layers.1.self_attn.q_proj"]


def test_linears_of_blocks_have_the_codes_of_their_rows(folder: Path) -> None:
    plain, rounded = load_decoder(folder), load_decoder(folder, base=INT8)
    layers = quantised_modules(rounded)
    assert len(layers) == 2 * 7
    assert base_fingerprint(rounded) == base_fingerprint(plain)
    for name, layer in layers.items():
        expected = quantise_int8(plain.get_submodule(name).get_parameter("weight"))
        assert isinstance(layer, Int8Linear)
        assert torch.equal(layer.weight, expected.codes)
        assert torch.equal(layer.unpacked(), expected.codes * expected.scales)


@pytest.mark.parametrize("at_once", [int8.PIECE_ELEMENTS, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_the_values(
    folder: Path, dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (int8, row_scaled):
        monkeypatch.setattr(module, "PIECE_ELEMENTS", at_once)  # two rows of 16
    layer = a_layer(load_decoder(folder, base=INT8))
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    y = layer(x)
    values, bias = layer.unpacked(torch.float64), layer.bias
    assert bias is not None
    near = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y.double(), x.double() @ values.T + bias, **near)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx.double(), torch.ones(3, 5, 16).double() @ values, **near)


def test_lora_merges_into_the_values(folder: Path) -> None:
    model = load_decoder(folder, base=INT8)
    with torch.no_grad():
        before = model(IDS)
        apply_lora(model, LoRAConfig(rank=2))
        assert torch.equal(model(IDS), before)
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == ("lora_" in name)
            if name.endswith("lora_B"):
                parameter.add_(0.1)
        adapted = model(IDS)
        merge_lora(model)
        torch.testing.assert_close(model(IDS), adapted, rtol=1e-4, atol=1e-4)
    assert quantised_modules(model) == {}


def test_scales_keep_their_dtype_when_the_model_gets_another(folder: Path) -> None:
    model = load_decoder(folder, base=INT8)
    former = a_layer(model).unpacked(torch.float32)
    layer = a_layer(model.bfloat16())
    assert layer.get_buffer("weight_scale").dtype is torch.float32
    assert torch.equal(layer.unpacked(torch.float32), former)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_codes_stay_codes_when_a_model_gets_another_dtype(folder: Path, kind: str) -> None:
    model = load_decoder(folder, base=BaseWeights(kind))  # type: ignore[arg-type]
    former = a_layer(model).unpacked(torch.float32)
    assert torch.equal(a_layer(model.double()).unpacked(torch.float32), former)


def test_what_int8_cannot_hold_is_refused(folder: Path, tmp_path: Path) -> None:
    layer = a_layer(load_decoder(folder, base=INT8))
    weight = torch.ones(16, 16)
    weight[7, 3] = torch.inf
    with pytest.raises(ModelError, match=r"quantise a\.weight to int8.*not finite, in rows 7"):
        layer.load(weight, "a.weight")
    model = load_decoder(folder, base=INT8)
    with pytest.raises(ModelError, match=r"int8 linears.*Save its adapter"):
        save_decoder(model, tmp_path / "saved")
    with pytest.raises(TargetError, match=r"stored in int8, which cannot train"):
        apply_lora(model, LoRAConfig(rank=2, targets=("q_proj",), modules_to_save=("up_proj",)))
