"""Folders in 4 bits loaded: values of bitsandbytes to the bit, mixed ones too, faults by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora.config import BaseWeights
from lora.decoder.decoder import Decoder
from lora.decoder.quantised.base import quantised_modules
from lora.errors import ConfigError, ModelError
from lora.pretrained.hf_weights import load_decoder, map_decoder, read_stored_dtypes
from lora.pretrained.quantised.folder import find_4bit
from tests.finetune.tiny_models import save_tiny
from tests.pretrained.quantised.four_bit import QUANTISATION, change_config, write_4bit
from tests.pretrained.tiny_models import save_tiny_transformers


def save_plain(family: str, folder: Path) -> Path:
    if family == "phi3":  # q, k and v are one linear there, gate and up too
        return save_tiny_transformers(family, folder)
    return save_tiny(folder, family)


def load_values(folder: Path, values: dict[str, Tensor], dtype: torch.dtype) -> Decoder:
    """Return the plain model in `folder` with other values; `values` are (O, I)."""
    model = load_decoder(folder, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    return model


@pytest.mark.parametrize("family", ["llama", "tied", "qwen3", "gemma3", "gpt2", "phi3"])
def test_every_value_is_that_of_bitsandbytes(tmp_path: Path, family: str) -> None:
    plain = save_plain(family, tmp_path / "plain")
    values = write_4bit(plain, tmp_path / "four", transposed=family == "gpt2")
    for dtype in (torch.float32, torch.bfloat16):
        model = load_decoder(tmp_path / "four", dtype=dtype)
        packed, parameters = quantised_modules(model), dict(model.named_parameters())
        assert {f"{name}.weight" for name in packed} == packed_names(tmp_path / "four")
        for name, expected in values.items():
            owner = packed.get(name.removesuffix(".weight"))
            seen = parameters[name] if owner is None else owner.unpacked()
            assert torch.equal(seen, expected.to(dtype)), name
            if owner is not None:
                assert (owner.value_dtype, owner.sample.numel()) == (dtype, 0)
    with torch.no_grad():
        ids = torch.arange(9)[None]
        twin, model = load_values(plain, values, torch.float32), load_decoder(tmp_path / "four")
        assert torch.allclose(model(ids), twin(ids), rtol=1e-5, atol=1e-5)


def packed_names(folder: Path) -> set[str]:
    found = find_4bit(folder)
    assert found is not None
    return set(found.packed)


def test_codes_are_mapped_from_the_file_and_not_copied(tmp_path: Path) -> None:
    write_4bit(save_tiny(tmp_path / "plain", "llama"), tmp_path / "four")
    model = load_decoder(tmp_path / "four", dtype=torch.bfloat16)
    addresses = sorted(layer.weight.data_ptr() for layer in quantised_modules(model).values())
    size = (tmp_path / "four" / "model.safetensors").stat().st_size
    assert addresses[-1] - addresses[0] < size


def test_a_mapped_folder_has_views_of_its_file(tmp_path: Path) -> None:
    values = write_4bit(save_tiny(tmp_path / "plain", "llama"), tmp_path / "four")
    mapped = map_decoder(tmp_path / "four")
    for name, layer in quantised_modules(mapped.model).items():
        assert torch.equal(layer.unpacked(), values[f"{name}.weight"])
        assert layer.value_dtype is torch.float32
    mapped.release()
    assert set(read_stored_dtypes(tmp_path / "four").values()) == {torch.float32}


def test_what_a_folder_leaves_plain_stays_plain(tmp_path: Path) -> None:
    """As in Unsloth's dynamic quantisation; `nf4` with the folder's settings changes nothing."""
    plain = save_tiny(tmp_path / "plain", "llama")
    values = write_4bit(
        plain, tmp_path / "four", block=128, double=False, skipped=lambda name: "layers.1" in name
    )
    base = BaseWeights("nf4", nf4_block=128, nf4_double_quant=False)
    for asked in (None, BaseWeights(), base):
        model = load_decoder(tmp_path / "four", base=asked)
        packed = quantised_modules(model)
        assert len(packed) == 7
        assert all(".layers.0." in f".{name}" for name in packed)
        assert torch.equal(model.get_parameter("model.layers.1.mlp.up_proj.weight"),
                           values["model.layers.1.mlp.up_proj.weight"])  # fmt: skip
    found = find_4bit(tmp_path / "four")
    assert found is not None
    assert found.base == found.settled(BaseWeights()) == base
    assert "blocks of 128, fp32 scales): 7 weights" in found.describe()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (BaseWeights("fp8"), ["base_dtype='fp8'", "with base_dtype='nf4'"]),
        (BaseWeights("nf4", nf4_block=128), ["nf4_block=128", "with nf4_block=64"]),
        (
            BaseWeights("nf4", nf4_double_quant=False),
            ["nf4_double_quant=False", "with nf4_double_quant=True"],
        ),
    ],
)
def test_other_settings_than_the_folders_are_refused(
    tmp_path: Path, asked: BaseWeights, words: list[str]
) -> None:
    write_4bit(save_tiny(tmp_path / "plain", "llama"), tmp_path / "four")
    with pytest.raises(ConfigError) as raised:
        load_decoder(tmp_path / "four", base=asked)
    for word in (*words, "in 4 bits already", "base_dtype=auto", "unquantised model"):
        assert word in str(raised.value)


def change_tensors(folder: Path, **tensors: Tensor) -> None:
    path = folder / "model.safetensors"
    changed = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({**load_file(path), **changed}, path, {"format": "pt"})


def test_faults_are_named_together(tmp_path: Path) -> None:
    write_4bit(save_tiny(tmp_path / "plain", "llama"), tmp_path / "four")
    path = tmp_path / "four" / "model.safetensors"
    tensors = load_file(path)
    first, second = (f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1))
    del tensors[f"{first}.absmax"], tensors[f"{second}.quant_state.bitsandbytes__nf4"]
    save_file(tensors, path, {"format": "pt"})
    for read in (load_decoder, find_4bit):
        with pytest.raises(ModelError) as raised:
            read(tmp_path / "four")
        for word in (f"{first}.absmax", f"{second}.quant_state", "unquantised model"):
            assert word in str(raised.value)


def test_shapes_and_scales_that_cannot_be_are_refused(tmp_path: Path) -> None:
    write_4bit(save_tiny(tmp_path / "plain", "llama"), tmp_path / "four")
    change_config(tmp_path / "four", intermediate_size=24)
    with pytest.raises(ModelError, match=r"up_proj.weight is \(20, 16\) in the file.*\(24, 16\)"):
        load_decoder(tmp_path / "four")
    change_config(tmp_path / "four", intermediate_size=20)
    name = "model.layers.0.mlp.up_proj.weight.nested_absmax"
    change_tensors(tmp_path / "four", **{name: torch.tensor([float("nan")])})
    with pytest.raises(ModelError, match=r"up_proj.weight has scales that are not finite"):
        load_decoder(tmp_path / "four")


def test_a_folder_that_says_4_bits_of_plain_weights_is_refused(tmp_path: Path) -> None:
    plain = save_tiny(tmp_path / "plain", "llama")
    assert find_4bit(plain) is None
    change_config(plain, quantization_config=QUANTISATION)
    for read in (load_decoder, find_4bit):
        with pytest.raises(ModelError, match=r"Remove quantization_config.*--base-dtype nf4"):
            read(plain)


def test_an_embedding_in_4_bits_is_refused(tmp_path: Path) -> None:
    write_4bit(save_tiny(tmp_path / "plain", "llama"), tmp_path / "four", also=("lm_head.weight",))
    with pytest.raises(ModelError, match=r"lm_head.weight is in 4 bits: only the weights of the"):
        load_decoder(tmp_path / "four")


def test_fp4_is_refused_by_name(tmp_path: Path) -> None:
    write_4bit(save_tiny(tmp_path / "plain", "llama"), tmp_path / "four", kind="fp4")
    with pytest.raises(ModelError, match=r"bitsandbytes in fp4 \(quantization_config"):
        load_decoder(tmp_path / "four")
    change_config(tmp_path / "four", quantization_config=None)
    with pytest.raises(ModelError, match=r"bitsandbytes in fp4 \(it has a tensor"):
        load_decoder(tmp_path / "four")
