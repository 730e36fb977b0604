"""Folders written in 4 bits: transformers and bitsandbytes load them, and so do we, to the bit."""

from __future__ import annotations

import json
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lora.decoder.decoder import Decoder
from lora.decoder.quantised.base import quantised_modules
from lora.decoder.quantised.nf4 import Nf4Weight
from lora.errors import CheckpointError
from lora.kernels.nf4 import quantise_nf4
from lora.pretrained.hf_files import read_config
from lora.pretrained.hf_weights import load_decoder
from lora.pretrained.load.shards import write_shards
from lora.pretrained.quantised.write import PackedWeight, write_4bit_folder
from lora.runs.tensor_files import TensorParts
from tests.pretrained.quantised.four_bit import QUANTISATION, change_config, write_4bit
from tests.pretrained.tiny_models import save_tiny_transformers

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""Rows of whole blocks: bitsandbytes' kernel for AVX-512 is right for these."""


def save_wide(folder: Path, name: str = "llama-untied") -> Path:
    return save_tiny_transformers(name, folder, **WIDE)


def parts_of(model: Decoder, *, double: bool = True, block: int = 64) -> dict[str, Any]:
    """Return the weights of a plain model as they are written: the blocks' linears in nf4."""
    weights: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        if ".layers." not in name or tensor.dim() < 2:
            weights[name] = TensorParts(
                tensor.dtype, tuple(tensor.shape), lambda t=tensor: iter((t,))
            )
        else:
            weights[name] = PackedWeight(
                tuple(tensor.shape), tensor.dtype, block, double,
                lambda t=tensor: quantise_nf4(t, block, double_quant=double),
            )  # fmt: skip
    return weights


def write(plain: Path, folder: Path, **options: Any) -> None:
    kinds = {key: options.pop(key) for key in ("double", "block") if key in options}
    write_4bit_folder(
        read_config(plain),
        parts_of(load_decoder(plain), **kinds),
        folder,
        plain_linears=("lm_head",),
        compute_dtype=torch.float32,
        **options,
    )


@pytest.mark.parametrize("double", [True, False])
def test_tensors_are_those_that_bitsandbytes_writes(tmp_path: Path, double: bool) -> None:
    plain = save_wide(tmp_path / "plain")
    write_4bit(plain, tmp_path / "theirs", double=double)
    write(plain, tmp_path / "ours", double=double)
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if double and name.endswith("weight.absmax"):
            # Its table for 8-bit scales takes the second nearest level once in a thousand.
            distance = (ours[name].int() - tensor.int()).abs()
            assert distance.max() <= 1
            assert distance.sum() <= 1
        else:
            assert torch.equal(ours[name], tensor), name
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name


def test_transformers_loads_it_with_equal_logits(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    plain = save_wide(tmp_path / "plain")
    write(plain, tmp_path / "four", max_shard_bytes=40_000)
    assert (tmp_path / "four" / "model.safetensors.index.json").is_file()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "four").train()
    assert theirs.model.layers[1].mlp.up_proj.weight.quant_state.nested
    model, ids = load_decoder(tmp_path / "four"), torch.arange(9)[None]
    with torch.no_grad():
        seen, expected = model(ids), theirs(input_ids=ids).logits
    assert torch.allclose(seen, expected, rtol=1e-5, atol=1e-5)


def test_our_own_loader_reads_it_to_the_bit(tmp_path: Path) -> None:
    plain = save_wide(tmp_path / "plain", "phi3")
    write(plain, tmp_path / "four", block=128)
    weights = dict(load_decoder(plain).named_parameters())
    for name, layer in quantised_modules(load_decoder(tmp_path / "four")).items():
        assert isinstance(layer, Nf4Weight)
        packed, expected = layer.packed, quantise_nf4(weights[f"{name}.weight"].detach(), 128)
        for key in ("codes", "scales", "group_scales", "offset"):
            assert torch.equal(vars(packed)[key], vars(expected)[key]), (name, key)


def test_what_was_there_is_replaced_and_settings_are_new(tmp_path: Path) -> None:
    plain = save_wide(tmp_path / "plain")
    change_config(plain, quantization_config=None, dtype="bfloat16")
    write(plain, tmp_path / "four", max_shard_bytes=40_000)
    write(plain, tmp_path / "four", double=False)  # one file: no index or it would be loaded
    load_decoder(tmp_path / "four")
    config = json.loads((tmp_path / "four" / "config.json").read_text())
    settings = config["quantization_config"]
    assert settings["bnb_4bit_use_double_quant"] is False
    assert settings["llm_int8_skip_modules"] == ["lm_head"]
    assert set(QUANTISATION) <= set(settings)
    assert (config["torch_dtype"], "dtype" in config) == ("float32", False)
    assert not list((tmp_path / "four").glob(".*"))


def test_a_disk_that_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    plain = save_wide(tmp_path / "plain")
    monkeypatch.setattr("lora.pretrained.load.shards.write_tensor_parts", refuse)
    with pytest.raises(CheckpointError, match="No space left"):
        write(plain, tmp_path / "four")
    assert not (tmp_path / "four" / "config.json").exists()


def test_tensors_are_in_memory_one_shard_at_a_time(tmp_path: Path) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    seen = []

    def layout(name: str) -> dict[str, TensorParts]:
        tensor = torch.zeros(8)
        alive.add(tensor)
        seen.append(len(alive))
        return {name: TensorParts(tensor.dtype, (8,), partial(iter, (tensor,)))}

    write_shards(tmp_path, [["a", "b"], ["c", "d"], ["e"]], layout, 160)
    assert seen == [1, 2, 1, 2, 1]
