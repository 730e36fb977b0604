"""A base with fp8 linears, quantised tensor by tensor while it loads, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora.adapters.apply import apply_lora
from lora.adapters.fingerprint import base_fingerprint
from lora.adapters.merge import merge_lora
from lora.config import BaseDtype, BaseWeights, LoRAConfig
from lora.decoder.decoder import Decoder, build_decoder
from lora.decoder.families import decoder_config
from lora.decoder.quantised.fp8 import Fp8Linear, has_fp8_base
from lora.errors import ModelError, TargetError
from lora.kernels.step.fp8 import FP8
from lora.layers.quantised_model import build_quantised
from lora.pretrained.hf_weights import load_decoder, save_decoder

IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tiny Llama."""
    config = {
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    save_decoder(build_decoder(decoder_config(config), seed=2), tmp_path / "tiny")
    return tmp_path / "tiny"


def value(layer: Fp8Linear) -> torch.Tensor:
    return layer.weight.float() * layer.weight_scale


def linears(model: Decoder) -> dict[str, Fp8Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Fp8Linear)}


def test_linears_of_blocks_are_rounded_and_nothing_else(folder: Path) -> None:
    plain, rounded = load_decoder(folder), load_decoder(folder, base=BaseWeights("fp8"))
    assert has_fp8_base(rounded)
    assert not has_fp8_base(plain)
    layers = linears(rounded)
    assert len(layers) == 2 * 7
    weights = dict(plain.named_parameters())
    for name, parameter in rounded.named_parameters():
        owner = layers.get(name.rpartition(".")[0])
        if owner is None:
            assert torch.equal(parameter, weights[name]), name
            continue
        assert parameter.dtype == FP8
        error = (value(owner) - weights[name]).norm() / weights[name].norm()
        assert 0.005 < error < 0.05, name


def test_a_layer_multiplies_by_the_values_of_its_codes(folder: Path) -> None:
    layer = next(iter(linears(load_decoder(folder, base=BaseWeights("fp8"))).values()))
    x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, x @ value(layer).T)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, dy @ value(layer))


def test_the_base_keeps_its_fingerprint(folder: Path) -> None:
    plain, rounded = load_decoder(folder), load_decoder(folder, base=BaseWeights("fp8"))
    assert base_fingerprint(rounded) == base_fingerprint(plain)
    apply_lora(rounded, LoRAConfig(rank=2))
    assert base_fingerprint(rounded) == base_fingerprint(plain)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_named(folder: Path, bad: float) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][7, 3] = bad
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight.*not finite, in rows 7"):
        load_decoder(folder, base=BaseWeights("fp8"))


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_parts_of_the_rows_have_the_codes_of_the_whole(kind: BaseDtype) -> None:
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    whole = build_quantised(nn.Linear(24, 5, bias=False), "a", BaseWeights(kind))
    whole.load(weight, "a.weight")
    parts = [slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 5)]  # of four processes
    found = [whole.quantise_rows(weight[whole.rows_to_read(p)], p, "a.weight") for p in parts]
    codes = torch.cat([part.codes.view(torch.uint8) for part in found])
    assert torch.equal(codes, whole.weight.view(torch.uint8))
    assert sum(len(part.scales) for part in found) == whole.n_scales


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_a_value_beyond_fp32_is_not_finite_either(kind: BaseDtype) -> None:
    weight = torch.ones(3, 4, dtype=torch.float64)
    weight[2, 1] = -1e39
    linear = build_quantised(nn.Linear(4, 3, bias=False), "a", BaseWeights(kind))
    with pytest.raises(ModelError, match=rf"quantise a\.weight to {kind}.*not finite, in rows 2"):
        linear.load(weight, "a.weight")


def test_fresh_lora_changes_nothing_and_unwraps(folder: Path) -> None:
    model = load_decoder(folder, base=BaseWeights("fp8"))
    with torch.no_grad():
        before = model(IDS)
        apply_lora(model, LoRAConfig(rank=2))
        assert torch.equal(model(IDS), before)
    assert all(not p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)


def test_what_fp8_cannot_hold_is_refused(folder: Path, tmp_path: Path) -> None:
    model = load_decoder(folder, base=BaseWeights("fp8"))
    with pytest.raises(ModelError, match=r"fp8 linears.*Save its adapter"):
        save_decoder(model, tmp_path / "saved")
    with pytest.raises(TargetError, match=r"stored in fp8, which cannot train"):
        apply_lora(model, LoRAConfig(rank=2, targets=("q_proj",), modules_to_save=("up_proj",)))
    model = load_decoder(folder, base=BaseWeights("fp8"))
    adapted: nn.Module = apply_lora(model, LoRAConfig(rank=2))
    with pytest.raises(TargetError, match=r"base in FP8.*without fp8"):
        merge_lora(adapted)


def resident_bytes(folder: Path) -> int:
    """Return how much of the files in `folder` this process has mapped and in memory."""
    sizes, is_inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # the head of a mapping, with its path
            is_inside = str(folder) in line
        elif is_inside and words[0] == "Rss:":
            sizes += 1024 * int(words[1])
    return sizes


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="the kernel has no smaps")
@pytest.mark.parametrize("kind", ["fp8", "nf4"])
def test_no_unquantised_weight_stays_in_memory(tmp_path: Path, kind: BaseDtype) -> None:
    config = {
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    save_decoder(build_decoder(decoder_config(config), seed=2), tmp_path / "wide")
    n_file = sum(path.stat().st_size for path in (tmp_path / "wide").glob("*.safetensors"))
    model = load_decoder(tmp_path / "wide", base=BaseWeights(kind))
    assert resident_bytes(tmp_path / "wide") < n_file / 8
    model(IDS)  # the embedding is still there
