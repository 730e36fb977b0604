"""Mixtures of experts: what is saved is what PEFT reads, and what is left out is logged."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora.adapters.apply import (
    apply_lora,
    apply_lora_by_full_names,
    lora_layers,
    remove_lora,
)
from lora.adapters.experts import PEFT_EXPERT_NAMES
from lora.adapters.save_load import load_adapter, save_adapter
from lora.config import LoRAConfig
from lora.errors import AdapterError, TargetError

Fill = Callable[..., nn.Module]
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "mlp_only_layers": [0], "head_dim": 8},
    "glm4_moe": {"n_routed_experts": 4, "first_k_dense_replace": 1, "head_dim": 8},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "mixtral": {"num_local_experts": 4},
}
IDS = torch.tensor([[1, 7, 3, 5, 9, 2]])
DENSE = "model.layers.0.mlp.down_proj"


@pytest.fixture
def build(fill_random: Fill) -> Callable[[str], nn.Module]:
    transformers = pytest.importorskip("transformers")

    def build(kind: str) -> nn.Module:
        config = transformers.AutoConfig.for_model(kind, **{**COMMON, **MODELS[kind]})
        return fill_random(transformers.AutoModelForCausalLM.from_config(config), 0).eval()

    return build


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def load_in_peft(model: nn.Module, folder: Path) -> tuple[Any, Any]:
    """Return PEFT's model, and what loading a second time says of the keys."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not")
        theirs = peft.PeftModel.from_pretrained(model, folder)  # warns of missing keys
        return theirs, theirs.load_adapter(folder, "second")


@pytest.mark.parametrize("kind", MODELS)
def test_all_linear_is_what_peft_reads(
    kind: str,
    build: Callable[[str], nn.Module],
    fill_random: Fill,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ours = apply_lora(build(kind), LoRAConfig(rank=4))
    assert re.search(r"tensors of experts \(.*, \d\d% of the parameters, are not", caplog.text)
    assert "they are no linear layers; LoRA is on " in caplog.text
    assert ("3 linears (model.layers.0.mlp." in caplog.text) == (kind == "qwen3_moe")
    assert ("6 linears (model.layers.0.mlp." in caplog.text) == (
        kind in ("glm4_moe", "deepseek_v3")
    )
    fill_random(ours, 5, only_trainable=True, std=0.3)
    save_adapter(ours, tmp_path)
    theirs, told = load_in_peft(build(kind), tmp_path)
    assert told.missing_keys == []
    assert told.unexpected_keys == []
    assert (logits(theirs) - logits(ours)).abs().max() <= 1e-5
    assert (logits(build(kind)) - logits(ours)).abs().max() > 1e-3
    assert torch.equal(logits(load_adapter(build(kind), tmp_path)), logits(ours))


@pytest.mark.parametrize("targets", ["down_proj", r".*layers\.0\.mlp\.up_proj", DENSE])
def test_names_that_peft_takes_for_experts_are_refused_before_training(
    targets: str, build: Callable[[str], nn.Module]
) -> None:
    model = build("qwen3_moe")
    with pytest.raises(TargetError, match="PEFT would read their LoRA as that of the experts"):
        apply_lora(model, LoRAConfig(rank=4, targets=targets))
    assert not lora_layers(model)


def test_saving_refuses_them_too(build: Callable[[str], nn.Module], tmp_path: Path) -> None:
    model = apply_lora_by_full_names(build("qwen3_moe"), LoRAConfig(rank=4, targets=(DENSE,)))
    with pytest.raises(AdapterError, match=re.escape(DENSE)):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_the_names_are_those_of_the_installed_peft() -> None:
    conversion = pytest.importorskip("peft.utils.transformers_weight_conversion")
    theirs = conversion._MOE_TARGET_MODULE_MAPPING
    assert {kind: frozenset(names) for kind, names in theirs.items()} == PEFT_EXPERT_NAMES


def test_a_file_of_single_experts_is_refused_by_name(
    build: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    generator, tensors = torch.Generator().manual_seed(1), {}
    for expert in range(4):
        sides = {"gate_proj": (32, 16), "up_proj": (32, 16), "down_proj": (16, 32)}
        for name, (n_in, n_out) in sides.items():
            key = f"base_model.model.model.layers.1.mlp.experts.{expert}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(2, n_in, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(n_out, 2, generator=generator)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM"}
    config["target_modules"] = ["gate_proj", "up_proj", "down_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = build("qwen3_moe")
    with pytest.raises(AdapterError, match="24 tensors adapt experts one by one") as caught:
        load_adapter(model, tmp_path)
    assert str(caught.value).count("  - ") == 1
    assert not lora_layers(model)
    merged = load_in_peft(build("qwen3_moe"), tmp_path)[0].merge_and_unload()  # the way out
    name, key = "model.layers.1.mlp.experts.down_proj", "layers.1.mlp.experts.3.down_proj"
    before, after = model.get_parameter(name), merged.get_parameter(name)
    a, b = (tensors[f"base_model.model.model.{key}.lora_{side}.weight"] for side in "AB")
    assert (after[3] - before[3] - 2 * b @ a).abs().max() <= 1e-5


def test_experts_in_any_model_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    experts = nn.Module()
    experts.down_proj = nn.Parameter(torch.zeros(3, 4, 4))
    model = nn.ModuleDict({"experts": experts, "q_proj": nn.Linear(4, 4, bias=False)})
    apply_lora(model, LoRAConfig(rank=2))
    assert "experts.down_proj, for one), 75% of the parameters, are not adapted" in caplog.text
    remove_lora(model)
    apply_lora(model, LoRAConfig(rank=3))  # another candidate on the same model
    assert caplog.text.count("are not adapted") == 1


def test_experts_are_no_targets_and_loading_says_nothing_of_them(
    build: Callable[[str], nn.Module], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build("qwen3_moe")
    with pytest.raises(TargetError, match=r"'w1'.*Experts and routers here .* are not adapted"):
        apply_lora(model, LoRAConfig(rank=2, targets=("q_proj", "w1")))
    assert not lora_layers(model)
    save_adapter(apply_lora(model, LoRAConfig(rank=2, targets=("q_proj",))), tmp_path)
    assert "are not adapted" in caplog.text
    caplog.clear()
    load_adapter(build("qwen3_moe"), tmp_path)
    assert "are not adapted" not in caplog.text
