"""LoRA on every tiny architecture of transformers, held against PEFT: layers, gradients, files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora.adapters.apply import (
    applied_lora,
    apply_lora,
    lora_layers,
    remove_lora,
    train_token_rows,
)
from lora.adapters.merge import merge_lora
from lora.adapters.save_load import load_adapter, save_adapter
from lora.adapters.targets import find_targets
from lora.config import LoRAConfig
from lora.data.sequences.batches import IGNORE, Batch
from lora.errors import TargetError
from lora.pretrained.transformers_models.load import as_language_model
from lora.pretrained.transformers_models.quiet import quiet
from lora.training.losses import loss_for
from tests.pretrained.tiny_models import (
    ARCHITECTURES,
    FURTHER,
    VOCAB,
    tiny_multimodal,
    tiny_transformers,
)

transformers = pytest.importorskip("transformers")

RANK, ALPHA = 3, 7.0
SUBSETS = {
    "llama": ("q_proj", "down_proj"),
    "gpt2": ("c_attn", "mlp.c_proj"),
    "gptj": ("k_proj", "fc_out"),
    "gpt_neox": ("query_key_value", "dense_4h_to_h"),
    "bloom": ("query_key_value", "dense_h_to_4h"),
    "falcon": ("query_key_value", "dense"),
    "opt": ("out_proj", "fc1"),
    "phi3": ("qkv_proj", "down_proj"),
    "starcoder2": ("v_proj", "c_fc"),
    "mpt": ("Wqkv",),
}
"""Targets that are not all linears: fused, transposed, with a bias."""
LEFT_OUT = {
    "qwen3_moe": {"gate_proj", "up_proj", "down_proj"},
    "llama4_text": {"router"},
    "mamba": {"dt_proj", "x_proj", "out_proj"},
}
"""Linears that PEFT's all-linear names and ours leaves out: see docs/models.md for the reasons."""


@pytest.fixture
def peft() -> Iterator[Any]:
    module = pytest.importorskip("peft")
    with warnings.catch_warnings():  # of PEFT itself; those about keys that do not fit stay errors
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        yield module


def ids() -> Tensor:
    return torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))


def adapted(name: str, targets: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the model with LoRA, and its A and B by PEFT's names."""
    model = apply_lora(
        as_language_model(tiny_transformers(name)),
        LoRAConfig(rank=RANK, alpha=ALPHA, targets=targets, init_seed=0),
    )
    tensors: dict[str, Tensor] = {}
    draw = torch.Generator().manual_seed(5)
    for layer_name, layer in lora_layers(model).items():
        for side in ("lora_A", "lora_B"):
            tensor = layer.get_parameter(side)
            with torch.no_grad():
                tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.1)
            tensors[f"base_model.model.{layer_name}.{side}.default.weight"] = tensor
    return model.eval(), tensors


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found = model(ids())
    return found if isinstance(found, Tensor) else found.logits


def loss_of(found: Tensor) -> Tensor:
    wanted = ids()[:, 1:].flatten()
    return nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), wanted, reduction="sum")


def batch() -> Batch:
    labels = torch.cat([ids()[:, 1:], torch.full((2, 1), IGNORE)], 1)
    return Batch(ids(), labels, torch.arange(9).expand(2, 9), torch.zeros_like(labels))


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


CASES = [(name, "all-linear") for name in ARCHITECTURES] + list(SUBSETS.items())
SLOW_CASES = [pytest.param(name, "all-linear", marks=pytest.mark.slow) for name in FURTHER]


@pytest.mark.parametrize(("name", "targets"), CASES + SLOW_CASES)
def test_gradients_and_files_are_peft_s(name: str, targets: Any, tmp_path: Path, peft: Any) -> None:
    ours, tensors = adapted(name, targets)
    wanted = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(lora_layers(ours)) if targets == "all-linear" else list(targets),
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(tiny_transformers(name), wanted).eval()
    same = {n: p for n, p in theirs.named_parameters() if n in tensors}
    assert (
        same.keys() == tensors.keys() == {n for n, _ in theirs.named_parameters() if "lora_" in n}
    )
    with torch.no_grad():
        for parameter_name, parameter in same.items():
            parameter.copy_(tensors[parameter_name])
    assert_close(logits(ours), logits(theirs))
    loss, n_tokens = loss_for(ours)(ours, batch())
    wanted_loss = loss_of(theirs(ids(), use_cache=False).logits)
    assert n_tokens.item() == 16
    assert not as_language_model(tiny_transformers(name)).needs_all_logits
    assert_close(loss[0], wanted_loss)
    loss.sum().backward()
    wanted_loss.backward()
    for parameter_name, parameter in same.items():
        grad = tensors[parameter_name].grad
        assert grad is not None, parameter_name
        assert parameter.grad is not None, parameter_name
        assert_close(grad, parameter.grad)

    save_adapter(ours, tmp_path / "ours")
    opened = peft.PeftModel.from_pretrained(tiny_transformers(name), tmp_path / "ours")
    told = opened.load_adapter(tmp_path / "ours", "second")
    assert (told.missing_keys, told.unexpected_keys) == ([], [])
    assert_close(logits(opened), logits(ours))
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_adapter(as_language_model(tiny_transformers(name)), tmp_path / "theirs")
    assert torch.equal(logits(loaded), logits(ours))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merged_models_open_in_transformers(name: str, tmp_path: Path) -> None:
    model, _ = adapted(name, "all-linear")
    base = logits(tiny_transformers(name))
    before, theirs = logits(model), as_language_model(model).theirs
    assert (before - base).norm() > 1e-3 * base.norm()
    report = merge_lora(model, ids())
    assert report.relative_error is not None
    assert report.relative_error <= 1e-5
    assert not report.untied_head
    with quiet():
        theirs.save_pretrained(tmp_path)
        again, told = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, output_loading_info=True
        )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert_close(logits(again), before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "bloom"])
def test_removed_lora_leaves_the_base(name: str) -> None:
    model, _ = adapted(name, "all-linear")
    remove_lora(model)
    plain = tiny_transformers(name)
    assert torch.equal(logits(model), logits(plain))
    kinds = [type(module) for module in plain.modules() if isinstance(module, nn.Linear)]
    assert [type(module) for module in model.modules() if isinstance(module, nn.Linear)] == kinds


def test_all_linear_is_peft_s(peft: Any) -> None:
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    for name in ARCHITECTURES:
        model = tiny_transformers(name)
        config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
        wanted = _maybe_include_all_linear_layers(config, model).target_modules
        found = find_targets(as_language_model(model), LoRAConfig(rank=2))
        left_out = {module.rpartition(".")[2] for module in wanted - set(found)}
        assert left_out == LEFT_OUT.get(name, set()), name
        assert set(found) <= wanted, name


def test_linears_that_a_mixer_never_calls_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_transformers("mamba")
    with pytest.raises(TargetError, match=r"MambaMixer reads its weight without calling the layer"):
        apply_lora(model, LoRAConfig(rank=2, targets=("in_proj", "x_proj")))
    assert not lora_layers(model)
    apply_lora(model, LoRAConfig(rank=2))
    assert "6 linears (backbone.layers.0.mixer.dt_proj, for one)" in caplog.text
    assert (
        "not adapted, because the model reads the weight without calling the layer" in caplog.text
    )


def test_a_router_is_left_out_and_refused_by_name(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_transformers("llama4_text")
    with pytest.raises(TargetError, match=r"router', a Llama4Router: .* it has a forward of its"):
        apply_lora(model, LoRAConfig(rank=2, targets=("router",)))
    assert not lora_layers(model)
    apply_lora(model, LoRAConfig(rank=2))
    assert "1 linear (model.layers.1.feed_forward.router), " in caplog.text
    assert "not adapted, because what is computed there is no plain linear layer" in caplog.text


def test_of_a_multimodal_model_the_text_part_is_adapted(tmp_path: Path, peft: Any) -> None:
    plain = tiny_multimodal()
    model = as_language_model(plain)
    assert len(find_targets(model, LoRAConfig(rank=2, targets="q_proj"))) == 2
    with pytest.raises(TargetError, match="no linear layer has this name"):
        find_targets(model, LoRAConfig(rank=2, targets="out_proj"))  # of the vision tower
    before = {name: parameter.clone() for name, parameter in plain.named_parameters()}
    apply_lora(model, LoRAConfig(rank=2, init_seed=0))
    names = list(lora_layers(model))
    assert len(names) == 14
    assert all(name.startswith("model.language_model.layers.") for name in names)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.fill_(0.05)
    save_adapter(model, tmp_path)
    wanted = logits(model)
    remove_lora(model)
    assert all(torch.equal(p, before[name]) for name, p in plain.named_parameters())
    assert_close(logits(peft.PeftModel.from_pretrained(plain, tmp_path)), wanted)


@pytest.mark.parametrize("name", ["opt", "bloom", "mamba", "cohere2", "gpt_neox"])
def test_rows_of_added_tokens_train_beside_lora(name: str, tmp_path: Path, peft: Any) -> None:
    model = adapted(name, "all-linear")[0]
    train_token_rows(model, [3, VOCAB])
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in applied_lora(model).trainable_tokens.values():
            layer.token_rows.add_(torch.randn(layer.token_rows.shape, generator=draw) * 0.1)
    save_adapter(model, tmp_path)
    plain = tiny_transformers(name)
    plain.resize_token_embeddings(VOCAB + 1, mean_resizing=False)
    opened = peft.PeftModel.from_pretrained(plain, tmp_path)
    told = opened.load_adapter(tmp_path, "second")
    assert (told.missing_keys, told.unexpected_keys) == ([], [])
    assert_close(logits(opened)[..., :VOCAB], logits(model)[..., :VOCAB])
    loaded = load_adapter(as_language_model(tiny_transformers(name)), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("name", "words"), [("gptj", "the output head has a bias"), ("gemma", "a GemmaTextScaledWord")]
)
def test_rows_that_cannot_be_replaced_are_refused(name: str, words: str) -> None:
    model = adapted(name, "all-linear")[0]
    with pytest.raises(TargetError, match=words):
        train_token_rows(model, [3])
