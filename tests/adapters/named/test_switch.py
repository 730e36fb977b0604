"""Several adapters on one model: each computes what it does alone, and switching loses nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora
from lora.adapters.apply import (
    apply_lora,
    disabled_adapter,
    remove_lora,
    train_token_rows,
    trained_parameters,
)
from lora.adapters.merge import merge_lora
from lora.adapters.named.switch import active_adapter, adapter_names, delete_adapter, set_adapter
from lora.adapters.save_load import load_adapter, save_adapter
from lora.config import BaseWeights, LoRAConfig
from lora.decoder.decoder import Decoder, build_decoder
from lora.decoder.quantised.fp8 import Fp8Linear
from lora.errors import AdapterError, TargetError
from lora.layers.quantised_model import use_quantised_linears
from tests.fast.memory.conftest import TINY

Build = Callable[[str], nn.Module]
Fill = Callable[..., nn.Module]

CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "llama-tied": {
        "all": {"rank": 4},
        "some": {"rank": 2, "alpha": 3.0, "targets": ("q_proj", "down_proj"), "rslora": True},
        "embedding": {"rank": 3, "targets": ("v_proj",), "modules_to_save": ("embed_tokens",)},
        "tokens": {"rank": 2, "targets": ("o_proj",)},
    },
    "gpt2-tied": {
        "all": {"rank": 4},
        "some": {"rank": 2, "targets": ("c_attn",)},
        "embedding": {"rank": 2, "targets": ("c_fc",), "modules_to_save": ("wpe", "ln_f")},
    },
}


def logits_of(model: nn.Module, token_ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(token_ids).logits
    return logits


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def alone(
    family: str, tiny_model: Build, fill_random: Fill, token_ids: Tensor, tmp_path: Path
) -> dict[str, Tensor]:
    """By name: the logits of each adapter, saved in a directory of its name, on a model alone."""
    found = {}
    for seed, (name, options) in enumerate(CONFIGS[family].items(), 5):
        model = apply_lora(tiny_model(family), LoRAConfig(**options, init_seed=0))
        if name == "tokens":
            train_token_rows(model, [3, 9])
        fill_random(model, seed, only_trainable=True)
        save_adapter(model, tmp_path / name)
        found[name] = logits_of(model, token_ids)
    return found


@pytest.fixture
def several(family: str, alone: dict[str, Tensor], tiny_model: Build, tmp_path: Path) -> nn.Module:
    """A model with all of them, the first active."""
    model = tiny_model(family)
    for name in alone:
        assert load_adapter(model, tmp_path / name, name=name) is model
    return model


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def check_same(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


def test_each_computes_as_it_does_alone_in_any_order(
    several: nn.Module, alone: dict[str, Tensor], token_ids: Tensor
) -> None:
    assert adapter_names(several) == sorted(alone)
    assert active_adapter(several) == "all"  # loading another does not switch, as in PEFT
    for name in [*alone, *reversed(alone), "all", "all"]:
        assert set_adapter(several, name) is several
        assert active_adapter(several) == name
        assert torch.equal(logits_of(several, token_ids), alone[name])


def test_the_base_is_there_under_each_and_at_the_end(
    several: nn.Module, family: str, tiny_model: Build, token_ids: Tensor
) -> None:
    base = tiny_model(family)
    expected, state = logits_of(base, token_ids), base.state_dict()
    for name in adapter_names(several):
        set_adapter(several, name)
        with disabled_adapter(several), disabled_adapter(several):  # a block within a block too
            assert torch.equal(logits_of(several, token_ids), expected)
        assert active_adapter(several) == name
    remove_lora(several)
    check_same(several, {key: tensor.clone() for key, tensor in state.items()})
    assert torch.equal(logits_of(several, token_ids), expected)
    apply_lora(several)  # nothing of the others is left
    assert adapter_names(several) == ["default"]


def test_each_is_saved_as_it_was_read(
    several: nn.Module, alone: dict[str, Tensor], tmp_path: Path
) -> None:
    for name in alone:
        save_adapter(several, tmp_path / "again", name=name)
        assert active_adapter(several) == "all"
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            again, first = (tmp_path / x / file for x in ("again", name))
            assert again.read_bytes() == first.read_bytes()


def test_a_model_that_moves_takes_the_waiting_ones_along(
    several: nn.Module, alone: dict[str, Tensor], token_ids: Tensor
) -> None:
    several.double()
    for name in alone:
        set_adapter(several, name)
        assert all(
            p.dtype == torch.float64 for n, p in several.named_parameters() if "lora" not in n
        )
        torch.testing.assert_close(
            logits_of(several, token_ids), alone[name].double(), rtol=1e-4, atol=1e-4
        )


def test_training_one_leaves_the_others_and_the_base(
    alone: dict[str, Tensor], family: str, tiny_model: Build, tmp_path: Path, token_ids: Tensor
) -> None:
    model = tiny_model(family)
    before = state_of(model)
    load_adapter(model, tmp_path / "all", name="all")
    load_adapter(model, tmp_path / "some", name="some", trainable=True)
    assert not any(p.requires_grad for p in model.parameters())
    set_adapter(model, "some")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    optimizer = torch.optim.SGD(trained, lr=1.0)
    logits = model.train()(token_ids).logits
    logits.square().mean().backward()
    optimizer.step()
    assert not torch.equal(logits_of(model, token_ids), alone["some"])
    set_adapter(model, "all")
    assert torch.equal(logits_of(model, token_ids), alone["all"])
    set_adapter(model, "some")
    assert sum(p.requires_grad for p in model.parameters()) == len(trained)
    remove_lora(model)
    check_same(model, before)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_peft_switches_to_the_same_logits(
    family: str, alone: dict[str, Tensor], tiny_model: Build, tmp_path: Path, token_ids: Tensor
) -> None:
    peft = pytest.importorskip("peft")
    names = [name for name in alone if name in ("all", "some")]
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "all", "all")
    theirs.load_adapter(tmp_path / "some", adapter_name="some")
    for name in names:
        theirs.set_adapter(name)
        torch.testing.assert_close(logits_of(theirs, token_ids), alone[name], rtol=1e-4, atol=1e-4)


def test_names(several: nn.Module, alone: dict[str, Tensor], tmp_path: Path) -> None:
    before = state_of(several)
    for name in ("", "a.b", 3):
        with pytest.raises(AdapterError, match="Cannot call an adapter"):
            load_adapter(several, tmp_path / "all", name=name)  # type: ignore[arg-type]
    for name in ("all", "some"):
        with pytest.raises(AdapterError, match=f"Cannot load an adapter as '{name}': there is one"):
            load_adapter(several, tmp_path / "all", name=name)
    with pytest.raises(AdapterError, match=r"'sone': it is not loaded\. Did you mean 'some'"):
        set_adapter(several, "sone")
    with pytest.raises(AdapterError, match="Cannot activate the adapter 'sone'"):
        save_adapter(several, tmp_path / "out", name="sone")
    with pytest.raises(AdapterError, match="Cannot delete the adapter 'all': it is active"):
        delete_adapter(several, "all")
    with pytest.raises(AdapterError, match="Cannot delete the adapter 'sone'"):
        delete_adapter(several, "sone")
    assert not (tmp_path / "out").exists()
    check_same(several, before)
    delete_adapter(several, "some")
    assert adapter_names(several) == sorted(set(alone) - {"some"})
    load_adapter(several, tmp_path / "some", name="some")
    check_same(several, before)


def test_what_would_break_while_disabled_is_refused(several: nn.Module, tmp_path: Path) -> None:
    before = state_of(several)
    with disabled_adapter(several):
        for call in (
            lambda: set_adapter(several, "some"),
            lambda: load_adapter(several, tmp_path / "all", name="new"),
            lambda: load_adapter(several, tmp_path / "all"),
            lambda: save_adapter(several, tmp_path / "all"),
            lambda: apply_lora(several, LoRAConfig()),
            lambda: remove_lora(several),
            lambda: merge_lora(several),
            lambda: train_token_rows(several, [3]),
        ):
            with pytest.raises(AdapterError, match=r"within disabled_adapter\(model\)"):
                call()
    check_same(several, before)


def test_an_adapter_that_cannot_be_loaded_leaves_the_others(
    several: nn.Module, alone: dict[str, Tensor], tmp_path: Path, token_ids: Tensor
) -> None:
    before = state_of(several)
    config = tmp_path / "some" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 5}))
    with pytest.raises(AdapterError, match="Cannot load the adapter"):
        load_adapter(several, tmp_path / "some", name="new")
    check_same(several, before)
    for name in alone:
        set_adapter(several, name)
        assert torch.equal(logits_of(several, token_ids), alone[name])


def test_merging_asks_for_the_others_to_be_deleted(several: nn.Module, token_ids: Tensor) -> None:
    before = state_of(several)
    with pytest.raises(AdapterError, match=r"Cannot merge.*some.*delete_adapter"):
        merge_lora(several)
    check_same(several, before)
    expected = logits_of(several, token_ids)
    for name in adapter_names(several):
        if name != "all":
            delete_adapter(several, name)
    merge_lora(several)
    torch.testing.assert_close(logits_of(several, token_ids), expected, rtol=1e-4, atol=1e-4)


def test_added_tokens_stand_alone(tiny_model: Build, tmp_path: Path, token_ids: Tensor) -> None:
    grown = apply_lora(tiny_model("llama-tied"), LoRAConfig(rank=2, init_seed=0))
    save_adapter(grown, tmp_path / "plain")
    train_token_rows(grown, [3, 64, 65])
    save_adapter(grown, tmp_path / "grown")
    with pytest.raises(AdapterError, match=r"\('default'\) adds tokens"):
        load_adapter(grown, tmp_path / "plain", name="plain")
    model = tiny_model("llama-tied")
    load_adapter(model, tmp_path / "plain", name="plain")
    load_adapter(model, tmp_path / "plain", name="twin")
    before, logits = state_of(model), logits_of(model, token_ids)
    with pytest.raises(AdapterError, match=r"\('new'\) adds tokens"):
        load_adapter(model, tmp_path / "grown", name="new")
    check_same(model, before)
    assert adapter_names(model) == ["plain", "twin"]
    assert torch.equal(logits_of(model, token_ids), logits)


def test_a_model_without_lora_has_no_adapters(tiny_model: Build) -> None:
    for call in (adapter_names, active_adapter):
        with pytest.raises(TargetError, match="has no LoRA"):
            call(tiny_model("llama-tied"))
    assert lora.set_adapter is set_adapter


def test_adapters_switch_over_an_fp8_base(token_ids: Tensor, tmp_path: Path) -> None:
    def build() -> Decoder:
        model = build_decoder(TINY, 1, dtype=torch.bfloat16)
        linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        use_quantised_linears(model, BaseWeights("fp8"))
        for name, module in model.named_modules():
            if isinstance(module, Fp8Linear):
                module.load(linears[name].weight.detach(), name)
        return model

    expected = {}
    for seed, targets in enumerate((("q_proj", "down_proj"), ("v_proj",))):
        model, name = build(), targets[0]
        apply_lora(model, LoRAConfig(rank=2, targets=targets))
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in trained_parameters(model):
                parameter.copy_(torch.randn(parameter.shape, generator=draw))
            expected[name] = model(token_ids)
        save_adapter(model, tmp_path / name)
    assert not torch.equal(*expected.values())
    several = build()
    for name in expected:
        load_adapter(several, tmp_path / name, name=name)
    for name in ("v_proj", "q_proj", "v_proj"):
        set_adapter(several, name)
        with torch.no_grad():
            assert torch.equal(several(token_ids), expected[name])
