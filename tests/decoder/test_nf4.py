"""A base with nf4 linears, quantised tensor by tensor while it loads, and what it refuses."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora.adapters.apply import apply_lora, remove_lora
from lora.adapters.fingerprint import base_fingerprint
from lora.config import BaseWeights, LoRAConfig
from lora.decoder.decoder import Decoder, build_decoder
from lora.decoder.families import decoder_config
from lora.decoder.quantised import base as quantised
from lora.decoder.quantised.base import base_kind, quantised_modules
from lora.decoder.quantised.nf4 import Nf4Linear, Nf4Weight
from lora.decoder.quantised.storage import describe_storage
from lora.errors import ModelError, TargetError
from lora.lora_module import count_lora_parameters
from lora.pretrained.hf_weights import load_decoder, save_decoder

NF4 = BaseWeights("nf4")
IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
CONFIG = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": True,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tiny Llama, whose linears in attention have biases."""
    model = build_decoder(decoder_config(CONFIG), seed=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    save_decoder(model, tmp_path / "tiny")
    return tmp_path / "tiny"


def linears(model: nn.Module) -> dict[str, Nf4Weight]:
    return {n: m for n, m in quantised_modules(model).items() if isinstance(m, Nf4Weight)}


def with_unpacked_values(folder: Path, packed: Decoder) -> Decoder:
    """Return the plain model whose linears have the values that those of `packed` unpack to."""
    plain = load_decoder(folder)
    with torch.no_grad():
        for name, module in linears(packed).items():
            plain.get_parameter(f"{name}.weight").copy_(module.unpacked())
    return plain


@pytest.mark.parametrize(
    "base", [NF4, replace(NF4, nf4_block=128), replace(NF4, nf4_double_quant=False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears_of_blocks_are_those_of_bitsandbytes_and_the_rest_is_as_it_was(
    folder: Path, base: BaseWeights, dtype: torch.dtype
) -> None:
    plain, packed = load_decoder(folder, dtype=dtype), load_decoder(folder, dtype=dtype, base=base)
    assert (base_kind(packed), base_kind(plain)) == ("nf4", None)
    layers, weights = linears(packed), dict(plain.named_parameters())
    assert len(layers) == 2 * 7
    for name, parameter in packed.named_parameters():
        owner = layers.get(name.rpartition(".")[0])
        if owner is None or name.endswith("bias"):
            assert torch.equal(parameter, weights[name]), name
            continue
        codes, state = bnb.quantize_4bit(
            weights[name].detach(),
            blocksize=base.nf4_block,
            compress_statistics=base.nf4_double_quant,
            quant_type="nf4",
        )
        assert torch.equal(parameter.view(-1), codes.view(-1))
        if base.nf4_block <= owner.in_features:
            assert torch.equal(owner.unpacked(), bnb.dequantize_4bit(codes, state))


def test_the_model_computes_as_a_plain_one_with_the_unpacked_values(folder: Path) -> None:
    packed = load_decoder(folder, base=NF4)
    plain = with_unpacked_values(folder, packed)
    config = LoRAConfig(rank=4, init_seed=0)
    gradients = []
    for model in (packed, plain):
        apply_lora(model, config)
        model.double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B"):
                    parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
        logits = model(IDS)
        logits.logsumexp(-1).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-10, atol=1e-12, msg=name)


def test_gradients_are_exact_in_fp64(folder: Path) -> None:
    layer = next(iter(linears(load_decoder(folder, base=NF4)).values())).double()
    x = torch.randn(3, 5, layer.in_features, dtype=torch.float64, requires_grad=True)
    weight, bias = layer.unpacked(torch.float64), layer.bias
    assert bias is not None
    torch.testing.assert_close(layer(x), x @ weight.T + bias, rtol=1e-12, atol=1e-12)
    (dx,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(dx, weight.sum(0).expand_as(x), rtol=1e-12, atol=1e-12)


def test_autocast_multiplies_by_the_values_rounded_once(folder: Path) -> None:
    layer = next(iter(linears(load_decoder(folder, base=NF4)).values()))
    x = torch.randn(4, layer.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        expected = nn.functional.linear(x, layer.unpacked(), layer.bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-7)


def test_autograd_saves_codes_and_scales_only(folder: Path) -> None:
    layer = linears(load_decoder(folder, base=NF4))["model.layers.0.mlp.up_proj"]
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(4, 32, requires_grad=True))
    assert {t.data_ptr() for t in saved if t.numel() > 2} <= {
        t.data_ptr() for t in (layer.weight, layer.weight_scales, layer.weight_group_scales)
    }


def test_one_weight_at_a_time_is_in_memory_unquantised(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []
    most = 0
    load = Nf4Weight.load

    def counted(self: Nf4Weight, weight: torch.Tensor, name: str) -> None:
        nonlocal most
        load(self, weight, name)
        seen.append(weakref.ref(weight))
        most = max(most, sum(ref() is not None for ref in seen))

    monkeypatch.setattr(Nf4Weight, "load", counted)
    load_decoder(folder, base=NF4)
    assert len(seen) == 2 * 7
    assert most <= 2  # the one being read, and the one before until its name is bound again


def test_dtypes_of_codes_and_scales_stay_when_a_model_is_cast(folder: Path) -> None:
    for base in (NF4, replace(NF4, nf4_double_quant=False)):
        model = load_decoder(folder, base=base)
        before = {name: layer.unpacked(torch.float32) for name, layer in linears(model).items()}
        model.bfloat16()
        model.double()
        for name, layer in linears(model).items():
            assert torch.equal(layer.unpacked(torch.float32), before[name])


def test_parameters_count_as_they_do_unquantised(folder: Path) -> None:
    plain, packed = load_decoder(folder), load_decoder(folder, base=NF4)
    assert count_lora_parameters(packed).total == count_lora_parameters(plain).total
    for model in (plain, packed):
        apply_lora(model, LoRAConfig(rank=2, targets=("q_proj", "down_proj")))
    assert count_lora_parameters(packed) == count_lora_parameters(plain)


def test_what_is_quantised_and_what_is_not_is_said(folder: Path) -> None:
    assert describe_storage(load_decoder(folder)) is None
    model = load_decoder(folder, base=NF4)
    said = describe_storage(model)
    assert said is not None
    assert said.startswith("base in nf4: 14 matrices, 4.")
    assert said.endswith("not quantised: embed_tokens, lm_head, 0.00 GB")
    config = {**CONFIG, "hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}
    save_decoder(build_decoder(decoder_config(config), seed=2), folder)
    tied = load_decoder(folder, base=replace(NF4, nf4_embeddings=True))
    assert (describe_storage(tied) or "").startswith("base in nf4: 15 matrices")
    assert "not quantised" not in (describe_storage(tied) or "not quantised")


def test_the_base_keeps_its_fingerprint(folder: Path) -> None:
    plain, packed = load_decoder(folder), load_decoder(folder, base=NF4)
    assert base_fingerprint(packed) == base_fingerprint(plain)
    apply_lora(packed, LoRAConfig(rank=2))
    assert base_fingerprint(packed) == base_fingerprint(plain)


def test_fresh_lora_changes_nothing_and_unwraps(folder: Path) -> None:
    model = load_decoder(folder, base=NF4)
    with torch.no_grad():
        before = model(IDS)
        apply_lora(model, LoRAConfig(rank=2))
        assert torch.equal(model(IDS), before)
        assert all(not p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)
        remove_lora(model)
        assert torch.equal(model(IDS), before)
    assert all(type(layer) is Nf4Linear for layer in linears(model).values())


def test_a_lora_layer_merges_into_a_linear_of_the_dtype_before(folder: Path) -> None:
    model = load_decoder(folder, base=NF4, dtype=torch.bfloat16)
    apply_lora(model, LoRAConfig(rank=2, targets=("up_proj",)))
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    with torch.no_grad():
        layer.lora_B.normal_(generator=torch.Generator().manual_seed(0))
        merged = layer.merge()
        exact = layer.unpacked(torch.float32) + layer.scaling * layer.lora_B @ layer.lora_A
    assert type(merged) is nn.Linear
    assert torch.equal(merged.weight, exact.bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_named(folder: Path, bad: float) -> None:
    change(folder, "model.layers.1.mlp.up_proj.weight", lambda weight: weight[7].fill_(bad))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight.*not finite, in rows 7"):
        load_decoder(folder, base=NF4)


def test_scales_without_a_mean_are_named(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change(folder, name, lambda weight: weight.fill_(3e38))
    with pytest.raises(ModelError, match=rf"{name}.*mean of their scales.*nf4_double_quant=false"):
        load_decoder(folder, base=NF4)
    model = load_decoder(folder, base=replace(NF4, nf4_double_quant=False))
    assert (linears(model)[name.removesuffix(".weight")].unpacked() == 3e38).all()


def change(folder: Path, name: str, how: object) -> None:
    """Change one tensor of a folder."""
    path = folder / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    how(tensors[name])  # type: ignore[operator]
    save_file(tensors, path)


def test_an_odd_number_of_inputs_is_named(tmp_path: Path) -> None:
    odd = decoder_config({**CONFIG, "intermediate_size": 49})
    save_decoder(build_decoder(odd, seed=2), tmp_path / "odd")
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.down_proj in nf4: it has 49 inputs"):
        load_decoder(tmp_path / "odd", base=NF4)


def test_what_nf4_cannot_hold_is_refused(folder: Path, tmp_path: Path) -> None:
    model = load_decoder(folder, base=NF4)
    with pytest.raises(ModelError, match=r"nf4 linears.*Save its adapter"):
        save_decoder(model, tmp_path / "saved")
    config = LoRAConfig(rank=2, targets=("q_proj",), modules_to_save=("up_proj",))
    with pytest.raises(TargetError, match=r"stored in nf4, which cannot train"):
        apply_lora(model, config)
    assert quantised.base_kind(model) == "nf4"
