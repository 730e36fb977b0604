"""Adapters against vLLM's rules, and the command that serves them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora.adapters.apply import apply_lora
from lora.adapters.save_load import save_adapter
from lora.config import LoRAConfig
from lora.decoder.decoder import build_decoder
from lora.decoder.families import decoder_config
from lora.errors import AdapterError
from lora.export.vllm import check_adapter_for_vllm, find_base, vllm_command
from tests.pretrained.tiny_models import save_tiny_transformers, tiny_transformers

PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
    "init_lora_weights": True,
    "modules_to_save": None,
    "rank_pattern": {},
    "use_dora": False,
}


def write_adapter(folder: Path, tensors: list[str] | None = None, **changes: Any) -> Path:
    modules = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    names = [f"model.layers.0.{m}.lora_{x}.weight" for m in modules for x in "AB"]
    names += tensors or []
    folder.mkdir(exist_ok=True)
    save_file(
        {f"base_model.model.{name}": torch.zeros(2, 2) for name in names},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **changes}))
    return folder


@pytest.mark.parametrize(
    "changes", [{}, {"r": 4}, {"r": 512}, {"use_rslora": True}, {"bias": "none"}]
)
def test_plain_adapters_are_fine(changes: dict[str, Any], tmp_path: Path) -> None:
    assert check_adapter_for_vllm(write_adapter(tmp_path, **changes)) == []


def test_our_own_adapters_are_fine(tiny_model: Callable[[str], nn.Module], tmp_path: Path) -> None:
    model = apply_lora(tiny_model("llama-tied"), LoRAConfig(rank=4))
    save_adapter(model, tmp_path / "adapter")
    assert check_adapter_for_vllm(tmp_path / "adapter") == []


def test_phi3s_fused_linears_are_fine(tmp_path: Path) -> None:
    sizes = {**CONFIG, "model_type": "phi3"}
    model = apply_lora(build_decoder(decoder_config(sizes)), LoRAConfig(rank=4))
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    save_adapter(model, tmp_path / "adapter", base_name=str(tmp_path))
    files = tmp_path / "adapter"
    assert json.loads((files / "adapter_config.json").read_text())["target_modules"] == [
        "down_proj",
        "gate_up_proj",
        "o_proj",
        "qkv_proj",
    ]
    assert check_adapter_for_vllm(files, find_base(files)) == []


CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_the_layers_are_compared_with_the_base(
    tiny_model: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    model = apply_lora(tiny_model("llama-tied"), LoRAConfig(rank=4))
    save_adapter(model, tmp_path / "adapter", base_name=str(tmp_path / "base"))
    assert find_base(tmp_path / "adapter") is None
    base = tmp_path / "base"
    base.mkdir()
    for change, words in (
        ({}, None),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\.\S+ and 6 more: .*base has no such layer"),
        ({"hidden_size": 64, "head_dim": 16}, r"q_proj.lora_A.weight is for 32 inputs, .* has 64"),
        (
            {
                "model_type": "gpt2",
                "n_embd": 32,
                "n_layer": 2,
                "n_head": 4,
                "num_key_value_heads": 4,
            },
            "and 13 more: ",
        ),
    ):
        (base / "config.json").write_text(json.dumps({**CONFIG, **change}))
        faults = check_adapter_for_vllm(tmp_path / "adapter", find_base(tmp_path / "adapter"))
        assert bool(faults) is (words is not None)
        assert words is None or any(re.search(words, fault) for fault in faults)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("opt", None),
        ("starcoder2", "a Starcoder2ForCausalLM: vLLM serves it without adapters"),
        ("gpt_bigcode", None),
        ("olmo2", None),
        ("gpt_neox", "a GPTNeoXForCausalLM: vLLM serves it without adapters. Merge"),
        ("mamba", "vLLM serves it without adapters"),
        ("codegen", "a CodeGenForCausalLM: vLLM is not known to serve it"),
    ],
)
def test_vllm_adapts_some_architectures(name: str, words: str | None, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    save_tiny_transformers(name, tmp_path)
    model = apply_lora(tiny_transformers(name), LoRAConfig(rank=2))
    save_adapter(model, tmp_path / "adapter", base_name=str(tmp_path))
    faults = check_adapter_for_vllm(tmp_path / "adapter", find_base(tmp_path / "adapter"))
    assert (faults == []) is (words is None)
    assert words is None or words in faults[0]


FAULTS: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "dora": ([], {"use_dora": True}, "DoRA is not supported. Merge"),
    "bias": ([], {"bias": "lora_only"}, "bias='lora_only': only 'none'"),
    "lora_bias": ([], {"lora_bias": True}, "biases of B"),
    "rank": ([], {"r": 600}, "rank 600: at most 512"),
    "no rank": ([], {"r": None}, "r=None: allowed is an int from 1 to 65536. Save"),
    "rank of a wrong type": ([], {"r": True}, "r=True: allowed is an int"),
    "no alpha": (
        [],
        {"lora_alpha": None},
        "lora_alpha=None: allowed is a number > 0, at most 1e+09",
    ),
    "no targets": ([], {"target_modules": None}, "target_modules=None: allowed is a pattern"),
    "odd pattern": ([], {"rank_pattern": [1]}, "rank_pattern=[1]: allowed is names with ints"),
    "odd modules": ([], {"modules_to_save": [["x"]]}, "allowed is a list of names"),
    "another method": ([], {"peft_type": "IA3"}, "peft_type='IA3': allowed is 'LORA'"),
    "rank pattern": (
        [],
        {"rank_pattern": {"q_proj": 4}},
        "silently ignore it and scale",
    ),
    "alpha pattern": ([], {"alpha_pattern": {"q_proj": 4}}, "alpha_pattern="),
    "pissa": ([], {"init_lora_weights": "pissa_niter_4"}, "changes the base's weights"),
    "whole": (
        ["model.embed_tokens.weight"],
        {"modules_to_save": ["embed_tokens"]},
        "fully trained modules are not supported",
    ),
    "other tensors": (["model.norm.weight"], {}, "model.norm.weight: only lora_A and lora_B"),
    "head": (["lm_head.lora_A.weight"], {}, "lm_head adapted: vLLM supports that for some"),
    "other layers": (["transformer.h.0.attn.c_attn.lora_A.weight"], {}, "c_attn adapted"),
}


@pytest.mark.parametrize("case", list(FAULTS))
def test_what_vllm_refuses_is_named_once(case: str, tmp_path: Path) -> None:
    tensors, changes, words = FAULTS[case]
    faults = check_adapter_for_vllm(write_adapter(tmp_path, tensors, **changes))
    assert len(faults) == 1
    assert words in faults[0]


def test_all_faults_are_named(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, ["model.norm.weight"], use_dora=True, bias="all", r=1000)
    assert len(check_adapter_for_vllm(folder)) == 4


def test_an_adapter_without_tensors_and_none_at_all(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    assert any("adapter_model.safetensors" in fault for fault in check_adapter_for_vllm(folder))
    with pytest.raises(AdapterError):
        check_adapter_for_vllm(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("rank", "max_rank"), [(1, 1), (4, 8), (8, 8), (12, 16), (33, 64), (300, 320), (512, 512)]
)
def test_the_command_asks_for_the_smallest_rank_that_fits(
    rank: int, max_rank: int, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "my adapter", r=rank)
    command = vllm_command(folder, "owner/base", "mine")
    assert command.startswith(f"vllm serve owner/base --enable-lora --max-lora-rank {max_rank} ")
    assert command.endswith(f"--lora-modules 'mine={folder}'")


@pytest.mark.parametrize("changes", [{"r": None}, {"r": 0}, {"r": "8"}])
def test_no_command_for_an_adapter_without_a_rank(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"Cannot serve.*\n.*r=.*an int from 1"):
        vllm_command(write_adapter(tmp_path, **changes), "owner/base")


def test_the_command_has_room_for_the_layer_of_the_highest_rank(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, r=8, rank_pattern={"q_proj": 40})
    assert "--max-lora-rank 64 " in vllm_command(folder, "owner/base")
