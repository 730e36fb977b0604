"""A base keeps its fingerprint under LoRA, dtypes and devices; another base has another one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lora.adapters.apply import apply_lora, remove_lora
from lora.adapters.fingerprint import base_fingerprint
from lora.config import LoRAConfig
from lora.decoder.quantised.base import SAMPLES_PER_TENSOR
from lora.errors import ModelError
from lora.pretrained.hf_weights import load_decoder

NAMES = ("llama-tied", "llama-untied", "gpt2-tied", "gpt2-untied")


@pytest.mark.parametrize("name", NAMES)
def test_lora_does_not_change_it(
    name: str, tiny_model: Callable[[str], nn.Module], fill_random: Callable[..., nn.Module]
) -> None:
    model = tiny_model(name)
    before = base_fingerprint(model)
    saved = ("embed_tokens", "model.norm") if name.startswith("llama") else ("wte", "ln_f")
    targets = ("q_proj", "lm_head") if name.startswith("llama") else ("c_attn", "c_proj", "lm_head")
    apply_lora(model, LoRAConfig(rank=2, targets=targets, modules_to_save=saved))
    fill_random(model, 1, only_trainable=True)
    assert base_fingerprint(model) == before
    assert base_fingerprint(remove_lora(model)) == before


def test_a_saved_container_counts_as_it_was(
    tiny_model: Callable[[str], nn.Module], fill_random: Callable[..., nn.Module]
) -> None:
    model = tiny_model("llama-tied")
    before = base_fingerprint(model)
    apply_lora(model, LoRAConfig(rank=2, targets="q_proj", modules_to_save=("layers.1.mlp",)))
    fill_random(model, 1, only_trainable=True)
    assert base_fingerprint(model) == before


def test_fp32_and_bf16_loadings_agree(tiny_model: Callable[[str], nn.Module]) -> None:
    model = tiny_model("llama-tied")
    assert base_fingerprint(copy.deepcopy(model).bfloat16()) == base_fingerprint(model)
    assert base_fingerprint(copy.deepcopy(model).double()) == base_fingerprint(model)


@pytest.mark.parametrize("name", NAMES)
def test_our_decoder_of_the_same_folder_agrees(
    name: str, tiny_model: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    assert base_fingerprint(load_decoder(tmp_path)) == base_fingerprint(model)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.q_proj.bias"])
def test_other_values_change_it(name: str, tiny_model: Callable[[str], nn.Module]) -> None:
    model = tiny_model("llama-tied")
    before = base_fingerprint(model)
    with torch.no_grad():
        model.get_parameter(name)[-1] += 0.5
    assert base_fingerprint(model) != before


def test_all_values_of_small_tensors_count_and_the_ends_of_large_ones() -> None:
    small, large = nn.Linear(SAMPLES_PER_TENSOR, 1, bias=False), nn.Linear(1000, 77, bias=False)
    for linear, places in ((small, range(SAMPLES_PER_TENSOR)), (large, (0, 76_999))):
        before = base_fingerprint(linear)
        for place in places:
            changed = copy.deepcopy(linear)
            with torch.no_grad():
                changed.weight.view(-1)[place] += 1.0
            assert base_fingerprint(changed) != before, place


def test_names_and_shapes_change_it() -> None:
    weight = torch.ones(6)
    seen = {
        base_fingerprint(nn.ParameterDict({name: weight.view(shape)}))
        for name in ("a", "b")
        for shape in ((6,), (2, 3), (3, 2))
    }
    assert len(seen) == 6


def test_the_order_in_which_modules_were_made_does_not_count() -> None:
    first = nn.ParameterDict({"a": torch.ones(2), "b": torch.zeros(3)})
    second = nn.ParameterDict({"b": torch.zeros(3), "a": torch.ones(2)})
    assert base_fingerprint(first) == base_fingerprint(second)


def test_tied_tensors_count_once(tiny_model: Callable[[str], nn.Module]) -> None:
    tied, untied = tiny_model("llama-tied"), tiny_model("llama-tied")
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())  # type: ignore[union-attr,operator]
    assert base_fingerprint(tied) != base_fingerprint(untied)


def test_odd_tensors_have_one_too() -> None:
    odd = nn.ParameterDict({"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 3)})
    fingerprint = base_fingerprint(odd)
    assert len(fingerprint) == 32
    assert set(fingerprint) <= set("0123456789abcdef")
    assert base_fingerprint(nn.ReLU()) != fingerprint


def test_slices_count_by_their_own_values() -> None:
    whole = torch.arange(60.0).view(6, 10)
    sliced = nn.ParameterDict({"a": whole[:, 2:5]})
    copied = nn.ParameterDict({"a": whole[:, 2:5].clone()})
    assert base_fingerprint(sliced) == base_fingerprint(copied)


def test_a_model_without_values_has_none() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    with pytest.raises(ModelError, match=r"(weight|bias) has no values .*Load the weights first"):
        base_fingerprint(model)
