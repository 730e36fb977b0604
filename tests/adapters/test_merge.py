"""Merging keeps the logits, or is refused and leaves the model adapted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora.adapters.apply import apply_lora, lora_layers
from lora.adapters.merge import TOLERANCES, default_forward, merge_lora
from lora.config import LoRAConfig
from lora.errors import AdapterError, ModelError, TargetError
from lora.pretrained.hf_weights import load_decoder, save_decoder

Fill = Callable[..., nn.Module]
Build = Callable[[str], nn.Module]


@pytest.fixture
def adapted(tiny_model: Build, fill_random: Fill) -> Callable[..., nn.Module]:
    def build(name: str = "llama-tied", **options: Any) -> nn.Module:
        model = apply_lora(tiny_model(name), LoRAConfig(**{"rank": 4} | options))
        return fill_random(model, 5, only_trainable=True, std=0.3)

    return build


def head_of(name: str) -> tuple[str, ...]:
    return ("q_proj", "down_proj", "lm_head") if name[0] == "l" else ("c_attn", "c_fc", "lm_head")


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "gpt2-tied", "gpt2-untied"])
@pytest.mark.parametrize("with_head", [False, True])
def test_merged_equals_adapted(
    name: str, with_head: bool, adapted: Callable[..., nn.Module], token_ids: Tensor
) -> None:
    model = adapted(name, **({"targets": head_of(name)} if with_head else {}))
    n_layers = len(lora_layers(model))
    expected = model(token_ids).logits
    report = merge_lora(model, token_ids)
    merged = model(token_ids).logits
    assert (merged - expected).norm() / expected.norm() <= 1e-6
    assert report.relative_error is not None
    assert report.relative_error <= 1e-6
    assert report.max_error == pytest.approx((merged - expected).abs().max().item(), rel=1e-3)
    assert report.layers == n_layers
    assert report.tolerance == TOLERANCES[torch.float32]
    assert report.rounding_error < 1e-7
    assert lora_layers(model) == {}
    assert "applied_lora" not in vars(model)
    assert report.untied_head is (with_head and name.endswith("-tied"))
    assert not any(p.requires_grad for p in model.parameters())


def test_layers_become_plain_again(adapted: Callable[..., nn.Module], tiny_model: Build) -> None:
    for name in ("llama-tied", "gpt2-tied"):
        model = adapted(name)
        merge_lora(model)
        plain = tiny_model(name)
        kinds = {n: type(m) for n, m in model.named_modules()}
        assert kinds == {n: type(m) for n, m in plain.named_modules()}
        assert model.state_dict().keys() == plain.state_dict().keys()
        apply_lora(model, LoRAConfig(rank=2))


def test_the_bases_tensors_are_not_written_to(adapted: Callable[..., nn.Module]) -> None:
    model = adapted()
    weights = {name: layer.weight for name, layer in lora_layers(model).items()}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    merge_lora(model)
    for name, weight in weights.items():
        assert torch.equal(weight, before[name])
        assert model.get_parameter(f"{name}.weight").data_ptr() != weight.data_ptr()
        assert not torch.equal(model.get_parameter(f"{name}.weight"), weight)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2-tied"])
def test_an_adapted_tied_head_gets_a_weight_of_its_own_and_is_saved(
    name: str, adapted: Callable[..., nn.Module], token_ids: Tensor, tmp_path: Path
) -> None:
    model = adapted(name, targets=head_of(name))
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    before = embedding.detach().clone()
    report = merge_lora(model, token_ids)
    assert report.untied_head
    assert model.config.tie_word_embeddings is False  # type: ignore[union-attr]
    assert model.get_input_embeddings().weight is embedding  # type: ignore[operator]
    assert torch.equal(embedding, before)
    assert not torch.equal(model.get_parameter("lm_head.weight"), before)
    expected = model(token_ids).logits
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = type(model).from_pretrained(tmp_path)  # type: ignore[attr-defined]
    assert torch.equal(loaded(token_ids).logits, expected)
    with torch.no_grad():
        decoder = load_decoder(tmp_path)
        torch.testing.assert_close(decoder(token_ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied"])
def test_fully_trained_modules_stay_as_trained(
    name: str, adapted: Callable[..., nn.Module], token_ids: Tensor, tmp_path: Path
) -> None:
    model = adapted(name, modules_to_save=("embed_tokens", "model.norm"))
    trained = model.get_parameter("model.embed_tokens.weight")
    head = model.get_parameter("lm_head.weight").detach().clone()
    report = merge_lora(model, token_ids)
    assert model.get_parameter("model.embed_tokens.weight") is trained
    assert torch.equal(model.get_parameter("lm_head.weight"), head)
    assert report.untied_head is (name == "llama-tied")
    assert model.config.tie_word_embeddings is False  # type: ignore[union-attr]
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = type(model).from_pretrained(tmp_path)  # type: ignore[attr-defined]
    assert torch.equal(loaded(token_ids).logits, model(token_ids).logits)


def test_a_head_that_stays_tied_is_left_so(
    adapted: Callable[..., nn.Module], token_ids: Tensor
) -> None:
    model = adapted("llama-tied")
    assert not merge_lora(model, token_ids).untied_head
    assert model.config.tie_word_embeddings is True  # type: ignore[union-attr]


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "lm_head")])
def test_our_decoder_is_merged_and_saved(
    targets: str | tuple[str, ...],
    tiny_model: Build,
    fill_random: Fill,
    token_ids: Tensor,
    tmp_path: Path,
) -> None:
    tiny_model("llama-tied").save_pretrained(tmp_path / "base")  # type: ignore[operator]
    decoder = load_decoder(tmp_path / "base")
    apply_lora(decoder, LoRAConfig(rank=4, targets=targets))
    fill_random(decoder, 5, only_trainable=True, std=0.3)
    report = merge_lora(decoder, token_ids)
    assert report.relative_error is not None
    assert report.relative_error <= 1e-6
    with_head = "lm_head" in targets
    assert report.untied_head is with_head
    assert decoder.config.tie_word_embeddings is not with_head
    save_decoder(decoder, tmp_path / "merged")
    with torch.no_grad():
        again = load_decoder(tmp_path / "merged")
        assert torch.equal(again(token_ids), decoder(token_ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once_and_reported(
    dtype: torch.dtype, adapted: Callable[..., nn.Module], token_ids: Tensor
) -> None:
    model = adapted("llama-untied", alpha=1.0).to(dtype)
    layers = copy.deepcopy(lora_layers(model))
    report = merge_lora(model, token_ids)
    lost = whole = update = 0.0
    for name, layer in layers.items():
        delta = layer.lora_B.float() @ layer.lora_A.float() * layer.scaling
        exact = layer.weight.float() + delta
        merged = model.get_parameter(f"{name}.weight")
        assert merged.dtype == dtype
        assert torch.equal(merged, exact.to(dtype))
        lost += (merged.float() - exact).square().sum().item()
        whole += exact.square().sum().item()
        update += delta.square().sum().item()
    assert report.rounding_error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert report.update_error == pytest.approx((lost / update) ** 0.5, rel=1e-3)
    assert report.update_error > report.rounding_error > 1e-5
    assert report.tolerance == TOLERANCES[dtype]
    assert report.relative_error is not None
    assert 1e-5 < report.relative_error <= report.tolerance


def test_without_inputs_the_logits_are_not_compared(adapted: Callable[..., nn.Module]) -> None:
    report = merge_lora(adapted())
    assert report.relative_error is None
    assert report.max_error is None
    assert report.layers == 14


def still_adapted(model: nn.Module, expected: Tensor, token_ids: Tensor) -> bool:
    return (
        len(lora_layers(model)) == 14
        and "applied_lora" in vars(model)
        and torch.equal(model(token_ids).logits, expected)
    )


def test_a_merge_that_changes_the_answers_is_refused(
    adapted: Callable[..., nn.Module], token_ids: Tensor
) -> None:
    model = adapted()
    expected = model(token_ids).logits
    flags = [module.training for module in model.train().modules()]
    with pytest.raises(AdapterError) as caught:
        merge_lora(model, token_ids, tolerance=1e-12)
    message = str(caught.value)
    assert "the merged model's logits differ by" in message
    assert "allowed is 1e-12" in message
    assert "The model is still adapted" in message
    assert [module.training for module in model.modules()] == flags
    assert still_adapted(model.eval(), expected, token_ids)


def test_answers_that_are_not_finite_are_refused(
    adapted: Callable[..., nn.Module], token_ids: Tensor
) -> None:
    model = adapted()
    with pytest.raises(AdapterError, match="differ by nan"):
        merge_lora(model, token_ids, forward=lambda m, x: m(x).logits * torch.nan)
    assert len(lora_layers(model)) == 14


def test_weights_that_are_not_finite_are_refused(
    adapted: Callable[..., nn.Module], token_ids: Tensor
) -> None:
    model = adapted().half()
    layer = lora_layers(model)["model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        layer.lora_B.fill_(6e4)
    with pytest.raises(AdapterError, match=r"weight of model.layers.1.mlp.up_proj is not finite"):
        merge_lora(model)
    assert len(lora_layers(model)) == 14


def test_an_error_in_the_forward_leaves_the_model_adapted(
    adapted: Callable[..., nn.Module], token_ids: Tensor
) -> None:
    model, calls = adapted(), []
    expected = model(token_ids).logits

    def fail_the_second_time(model: nn.Module, inputs: Tensor) -> Tensor:
        calls.append(len(lora_layers(model)))
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return model(inputs).logits

    with pytest.raises(RuntimeError, match="out of memory"):
        merge_lora(model, token_ids, forward=fail_the_second_time)
    assert calls == [14, 0]
    assert still_adapted(model, expected, token_ids)


def test_dropout_does_not_disturb_the_comparison(
    adapted: Callable[..., nn.Module], token_ids: Tensor
) -> None:
    model = adapted(dropout=0.5).train()
    model.get_submodule("model.norm").eval()  # modes may differ from part to part
    report = merge_lora(model, token_ids)
    assert report.relative_error is not None
    assert report.relative_error <= 1e-6
    assert model.get_submodule("model.layers.0.mlp.up_proj").training
    assert model.training
    assert not model.get_submodule("model.norm").training


def test_a_plain_model_has_nothing_to_merge(tiny_model: Build) -> None:
    with pytest.raises(TargetError, match="has no LoRA"):
        merge_lora(tiny_model("llama-tied"))


class _Returns(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, inputs: object) -> object:
        return self.value


def test_logits_are_found_in_what_a_model_returns() -> None:
    logits = torch.ones(2)
    for value in (logits, (logits, None), {"loss": torch.zeros(()), "logits": logits}):
        assert default_forward(_Returns(value), None) is logits


@pytest.mark.parametrize("value", [None, (), {"loss": torch.zeros(())}, (None,)])
def test_a_model_that_returns_no_logits_needs_a_forward(value: object) -> None:
    with pytest.raises(ModelError, match=r"Cannot find the logits.*Pass forward="):
        default_forward(_Returns(value), None)
