"""transformers' models over an nf4 base: what is quantised, read and computed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora.adapters.apply import apply_lora, lora_layers, replace_module
from lora.adapters.bases.unpack import unpack_base
from lora.adapters.fingerprint import base_fingerprint
from lora.config import BaseDtype, BaseWeights, LoRAConfig
from lora.decoder.quantised.base import QuantisedWeight, quantised_modules
from lora.errors import ConfigError, ModelError
from lora.layers.conv1d import is_conv1d
from tests.pretrained.tiny_models import (
    ARCHITECTURES,
    FURTHER,
    save_tiny_transformers,
    tiny_config,
    tiny_multimodal,
    tiny_transformers,
)

transformers = pytest.importorskip("transformers")
from lora.pretrained.load.task import check_native_only  # noqa: E402
from lora.pretrained.transformers_models import quantiser  # noqa: E402
from lora.pretrained.transformers_models.load import (  # noqa: E402
    load_transformers_model,
    read_transformers_config,
)
from lora.pretrained.transformers_models.quantisable import (  # noqa: E402
    QuantisableLinears,
    find_quantisable,
)
from lora.pretrained.transformers_models.quantiser import (  # noqa: E402
    Quantising,
    quantise_linears,
    why_not_quantised,
)
from lora.pretrained.transformers_models.save import save_transformers_model  # noqa: E402

NF4 = BaseWeights(base_dtype="nf4")
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
EACH = [
    *((name, "nf4") for name in ARCHITECTURES),
    *((name, kind) for name in ("gpt2", "mixtral") for kind in ("int8", "fp8")),
    *(pytest.param(name, "nf4", marks=pytest.mark.slow) for name in FURTHER),
]
READ_BY_CODE = {
    "mamba": {"x_proj", "dt_proj", "out_proj"},
    "falcon_mamba": {"x_proj", "dt_proj", "out_proj"},
    "jamba": {"dt_proj"},
    "mamba2": {"out_proj"},
    "bamba": {"out_proj"},
    "falcon_h1": {"out_proj"},
    "granitemoehybrid": {"out_proj"},
    "nemotron_h": {"out_proj"},
    "rwkv": {"output", "value"},
}
"""Linears whose weight something else than the linear reads, by architecture."""


@pytest.mark.parametrize(("name", "kind"), EACH)
def test_logits_and_gradients_are_those_over_the_same_values(name: str, kind: BaseDtype) -> None:
    quantised = tiny_transformers(name)
    plain = copy.deepcopy(quantised)
    found = quantise_linears(quantised, BaseWeights(base_dtype=kind))
    read = {name.rpartition(".")[2] for name, why in found.plain.items() if "reads" in why}
    assert read == READ_BY_CODE.get(name, set())
    for module_name, module in quantised_modules(quantised).items():
        fill(plain.get_submodule(module_name), module.unpacked())
    assert found.names == tuple(quantised_modules(quantised))
    adapt(quantised)
    adapt(plain)
    assert lora_layers(quantised).keys() == lora_layers(plain).keys()
    is_rwkv = name == "rwkv"  # whose code for evaluation changes weights in place
    (logits, grads), (wanted, wanted_grads) = (
        run(model.train(is_rwkv)) for model in (quantised, plain)
    )
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    for key, grad in wanted_grads.items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(grads[key], grad, rtol=1e-4, atol=1e-5 * scale + 1e-12)


def adapt(model: nn.Module) -> None:
    """Changes `model` in place: LoRA on all linears, with B at random."""
    apply_lora(model, LoRAConfig(rank=1, init_seed=0))
    generator = torch.Generator().manual_seed(1)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1, generator=generator)


def run(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits of a model, and the gradients of what trains in it."""
    logits = model(input_ids=IDS).logits
    logits.square().mean().backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return logits.detach(), {n: g for n, g in trained.items() if g is not None}


@torch.no_grad()
def fill(linear: nn.Module, values: Tensor) -> None:
    """Changes a linear, or a Conv1D, in place: its weight gets the `values` (O, I)."""
    assert isinstance(linear.weight, Tensor)
    linear.weight.copy_(values.T if is_conv1d(linear) else values)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "mixtral", "phi3", "multimodal"])
def test_a_folder_is_quantised_tensor_by_tensor(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / name
    if name == "multimodal":
        tiny_multimodal().save_pretrained(folder)
    else:
        save_tiny_transformers(name, folder)
    unpacked: list[int] = []  # linears with values in the compute dtype, before each is quantised
    quantise = Quantising.quantise

    def watched(how: Quantising, theirs: Any, name: str, weight: Tensor) -> dict[str, Tensor]:
        assert how.linears is not None
        linears = (theirs.get_submodule(own) for own in how.linears.names)
        unpacked.append(
            sum(not isinstance(m, QuantisedWeight) and not m.weight.is_meta for m in linears)
        )
        return quantise(how, theirs, name, weight)

    monkeypatch.setattr(Quantising, "quantise", watched)
    plain = load_transformers_model(folder, dtype=torch.bfloat16)
    model = load_transformers_model(folder, dtype=torch.bfloat16, base=NF4)
    modules = quantised_modules(model)
    assert unpacked == [0] * len(modules)
    assert modules.keys() == set(find_quantisable(plain.theirs).names)
    assert base_fingerprint(model) == base_fingerprint(plain)
    vision = [n for n in modules if "vision" in n]
    assert not vision
    for module_name, module in modules.items():
        linear = plain.get_submodule(module_name)
        before = linear.weight.T if is_conv1d(linear) else linear.weight
        assert module.bias is None or torch.equal(module.bias, linear.bias)
        assert (module.unpacked().float() - before.float()).abs().max() < 0.2 * before.abs().max()
    config = model.theirs.config.to_dict()
    assert "quantization_config" not in config
    assert not model.theirs.is_quantized


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_codes_are_those_that_transformers_gets_from_bitsandbytes(
    name: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    folder = save_tiny_transformers(name, tmp_path / name)
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.bfloat16, device_map="cpu"
    )
    base = BaseWeights(base_dtype="nf4", nf4_double_quant=False)
    model = load_transformers_model(folder, dtype=torch.bfloat16, base=base)
    modules = quantised_modules(model)
    found = {n: m for n, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"}
    assert modules.keys() == found.keys()
    for module_name, module in modules.items():
        weight = found[module_name].weight
        assert torch.equal(module.weight.flatten(), weight.flatten())
        assert torch.equal(module.get_buffer("weight_scales"), weight.quant_state.absmax)


def test_damaged_weights_are_refused_by_name(tmp_path: Path) -> None:
    theirs = tiny_transformers("phi3")
    with torch.no_grad():
        theirs.model.layers[1].mlp.down_proj.weight[3, 5] = torch.inf
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.weight .*not finite.*rows 3"):
        load_transformers_model(tmp_path, base=NF4)
    wide = tiny_transformers("phi3", intermediate_size=64)
    wide.config.intermediate_size = 48
    wide.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"down_proj\.weight is \(32, 64\) in the file"):
        load_transformers_model(tmp_path, base=NF4)


def test_an_architecture_whose_code_takes_no_quantised_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_transformers("mamba", tmp_path)
    quantiser._found.clear()
    assert why_not_quantised(tiny_config("phi3"), NF4) is None
    # Should its source not tell that mamba's code reads the head's dtype, a trial does.
    monkeypatch.setattr(
        quantiser, "find_quantisable", lambda theirs: QuantisableLinears(("lm_head",))
    )
    why = why_not_quantised(tiny_config("mamba"), NF4)
    assert why is not None
    assert "a small copy of it" in why
    with pytest.raises(ConfigError, match="Cannot use base_dtype='nf4' with this 'mamba' model"):
        check_native_only(read_transformers_config(tmp_path), base=NF4, fsdp=False)


def test_what_stays_plain_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_transformers_model(save_tiny_transformers("mixtral", tmp_path), base=NF4)
    assert "not in nf4: down_proj, gate_up_proj (4 tensors: experts" in caplog.text


def test_merged_layers_are_of_the_kind_that_they_were(tmp_path: Path) -> None:
    model = load_transformers_model(save_tiny_transformers("gpt2", tmp_path / "base"), base=NF4)
    with pytest.raises(ModelError, match="Cannot save a model with nf4 linears"):
        save_transformers_model(model, tmp_path / "packed")
    adapt(model)
    with torch.no_grad():
        wanted = model(IDS)
    for name, layer in lora_layers(model).items():
        replace_module(model, name, layer.merge())
    assert not quantised_modules(model)
    save_transformers_model(model, tmp_path / "merged")
    merged = load_transformers_model(tmp_path / "merged")
    assert {type(m) for m in merged.modules()} == {type(m) for m in model.modules()}
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS), wanted, rtol=1e-4, atol=1e-4)


def test_an_unpacked_base_is_saved_as_the_files_have_it(tmp_path: Path) -> None:
    model = load_transformers_model(save_tiny_transformers("gpt2", tmp_path / "base"), base=NF4)
    with torch.no_grad():
        wanted = model(IDS)
    unpack_base(model, torch.float32)
    save_transformers_model(model, tmp_path / "plain")
    with torch.no_grad():
        assert torch.equal(load_transformers_model(tmp_path / "plain")(IDS), wanted)
