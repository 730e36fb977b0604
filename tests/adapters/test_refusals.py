"""Every refusal leaves model and disk as they were: applying, loading, saving, merging."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora.adapters import patterns
from lora.adapters.apply import apply_lora, lora_layers, train_token_rows
from lora.adapters.merge import merge_lora
from lora.adapters.save_load import load_adapter, read_adapter_config, save_adapter
from lora.config import LoRAConfig
from lora.errors import LoraError
from lora.layers.vocabulary import MAX_NEW_ROWS, resize_vocabulary

Fill = Callable[..., nn.Module]
Build = Callable[[str], nn.Module]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
IDS = torch.tensor([[1, 7, 3]])
EMBEDDING, Q = "model.embed_tokens", "model.layers.1.self_attn.q_proj"
PREFIX = f"base_model.model.{Q}"
Act = Callable[[nn.Module, Path], object]


def applying(**options: Any) -> Act:
    return lambda model, folder: apply_lora(model, LoRAConfig(**{"rank": 2} | options))


def rows(ids: Any) -> Act:
    return lambda model, folder: train_token_rows(model, ids)


def with_config(**fields: Any) -> Act:
    def load(model: nn.Module, folder: Path) -> None:
        load_adapter(model, folder)

    load.fields = fields  # type: ignore[attr-defined]
    return load


def with_tensors(change: Callable[[dict[str, Tensor]], object]) -> Act:
    def load(model: nn.Module, folder: Path) -> None:
        load_adapter(model, folder)

    load.change = change  # type: ignore[attr-defined]
    return load


def spoilt(change: Callable[[nn.Module], Tensor], act: Act) -> Act:
    """Return `act` for a model with a NaN in the tensor that `change` names."""

    def run(model: nn.Module, folder: Path) -> None:
        act(model, folder)

    run.spoil = change  # type: ignore[attr-defined]
    return run


def save(model: nn.Module, folder: Path) -> None:
    save_adapter(model, folder / "new" / "adapter")


def save_over_a_file(model: nn.Module, folder: Path) -> None:
    save_adapter(model, folder / TENSORS)


def merge(model: nn.Module, folder: Path) -> None:
    merge_lora(model, IDS)


def q_proj(model: nn.Module) -> Tensor:
    return lora_layers(model)[Q].lora_B


PLAIN: dict[str, Act] = {
    "no such target": applying(targets="q_prj"),
    "no such pattern": applying(targets=".*nothing.*"),
    "no such exclusion": applying(exclude=("nothing",)),
    "all excluded": applying(targets="q_proj", exclude=("q_proj",)),
    "a pattern that hangs": applying(targets=r"(.|.)*(.|.)*x"),
    "no such block": applying(layers=(7,)),
    "a rank for nothing": applying(rank_pattern={"nothing": 3}),
    "an alpha for nothing": applying(alpha_pattern={"nothing": 3.0}),
    "no such module to save": applying(modules_to_save=("nothing",)),
    "saved and adapted": applying(targets="q_proj", modules_to_save=("q_proj",)),
    "saved inside adapted": applying(targets="q_proj", modules_to_save=("self_attn",)),
    "saved twice": applying(targets="q_proj", modules_to_save=("mlp", "mlp.up_proj")),
    "rows without LoRA": rows([3]),
    "too many rows": lambda model, folder: resize_vocabulary(model, 70 + MAX_NEW_ROWS),
    "saving without LoRA": save,
    "merging without LoRA": merge,
    "another rank": with_config(r=3),
    "no such field": with_config(a_new_switch=True),
    "DoRA": with_config(use_dora=True),
    "other targets": with_config(target_modules=["v_proj"]),
    "no targets": with_config(target_modules=["nothing"]),
    "not a linear": with_config(target_modules=["q_proj", "mlp"]),
    "a slow pattern": with_config(target_modules=r"(.|.)*(.|.)*x"),
    "a saved module too many": with_config(modules_to_save=["embed_tokens", "norm"]),
    "no saved module": with_config(modules_to_save=["embed_tokens", "nothing"]),
    "saved and a target": with_config(modules_to_save=["embed_tokens", "q_proj"]),
    "rows of a saved table": with_config(trainable_token_indices=[3]),
    "rows beyond any table": with_config(trainable_token_indices=[10**9]),
    "ties": with_config(ensure_weight_tying=True),
    "a missing tensor": with_tensors(lambda t: t.pop(f"{PREFIX}.lora_B.weight")),
    "a misshapen tensor": with_tensors(
        lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.ones(4, 9)})
    ),
    "a tensor too many": with_tensors(lambda t: t.update(stray=torch.ones(2))),
    "not finite": with_tensors(lambda t: t[f"{PREFIX}.lora_A.weight"].fill_(torch.nan)),
    "another base's copy": with_tensors(
        lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(32)})
    ),
    "no such folder": lambda model, folder: load_adapter(model, folder / "nothing"),
    "a folder above": lambda model, folder: load_adapter(model, folder.parent),
    "settings of nothing": lambda model, folder: read_adapter_config(folder / "nothing"),
}
ADAPTED: dict[str, Act] = {
    "LoRA twice": applying(),
    "no ids": rows([]),
    "a negative id": rows([-1]),
    "an id twice": rows([3, 3]),
    "no such table": rows({"norm": [3]}),
    "ids beyond any table": rows([10**7]),
    "other layers on the model": lambda model, folder: load_adapter(model, folder),
    "saving over a file": save_over_a_file,
    "saving NaN": spoilt(q_proj, save),
    "merging NaN": spoilt(q_proj, merge),
    "a merge that differs": lambda model, folder: merge_lora(model, IDS, tolerance=-1.0),
    "a forward without logits": lambda model, folder: merge_lora(
        model, IDS, forward=lambda m, ids: m(ids).nothing_here
    ),
}
WITH_ROWS: dict[str, Act] = {
    "rows twice": rows([5]),
    "other tokens on the model": lambda model, folder: load_adapter(model, folder),
    "merging rows of NaN": spoilt(lambda m: m.get_parameter(f"{EMBEDDING}.token_rows"), merge),
    "saving rows of NaN": spoilt(lambda m: m.get_parameter(f"{EMBEDDING}.token_rows"), save),
}
WITH_HEAD: dict[str, Act] = {
    "rows of an adapted head": rows([3]),
    "growing under an adapted head": lambda model, folder: resize_vocabulary(model, 70),
}
BUILDS: dict[str, tuple[dict[str, Act], dict[str, Any] | None]] = {
    "plain": (PLAIN, None),
    "adapted": (ADAPTED, {"targets": ("q_proj", "v_proj")}),
    "with rows": (WITH_ROWS, {"targets": "q_proj"}),
    "with an adapted head": (WITH_HEAD, {"targets": ("q_proj", "lm_head")}),
}
CASES = [(kind, name) for kind, (acts, _) in BUILDS.items() for name in acts]


@pytest.fixture
def folder(tiny_model: Build, fill_random: Fill, tmp_path: Path) -> Path:
    """An adapter of q_proj with a fully trained embedding."""
    model = apply_lora(
        tiny_model("llama-tied"),
        LoRAConfig(rank=4, targets="q_proj", modules_to_save=("embed_tokens",)),
    )
    fill_random(model, 5, only_trainable=True, std=0.3)
    save_adapter(model, tmp_path / "run" / "adapter")
    return tmp_path / "run" / "adapter"


def snapshot(model: nn.Module, folder: Path) -> Any:
    """Return all that a refusal must not change."""
    disk = {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [(n, id(m), type(m), m.training) for n, m in model.named_modules()]
    trains = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    config: Any = model.config
    tokens = config.vocab_size, config.tie_word_embeddings
    return tensors, (disk, modules, trains, sorted(vars(model)), tokens)


def prepare(act: Act, model: nn.Module, folder: Path) -> None:
    """Spoil the files in `folder`, or a tensor of `model`, as the case says."""
    asked = vars(act)
    if "fields" in asked:
        described = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(described | asked["fields"]))
    if "change" in asked:
        tensors = load_file(folder / TENSORS)
        asked["change"](tensors)
        save_file(tensors, folder / TENSORS)
    if "spoil" in asked:
        with torch.no_grad():
            asked["spoil"](model)[0, 0] = torch.nan


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{k}: {n}" for k, n in CASES])
def test_a_refusal_changes_neither_model_nor_disk(
    kind: str,
    name: str,
    tiny_model: Build,
    fill_random: Fill,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patterns, "MAX_MATCHING_S", 0.05)  # of the patterns that hang
    acts, options = BUILDS[kind]
    model = tiny_model("llama-tied").train()
    model.get_parameter("model.norm.weight").requires_grad_(False)  # not all of it trains
    if options is not None:
        apply_lora(model, LoRAConfig(rank=2, **options))
    if kind == "with rows":
        train_token_rows(model, [3, 9])
    if options is not None:
        fill_random(model, 4, only_trainable=True)
    prepare(acts[name], model, folder)
    tensors, before = snapshot(model, folder.parent)
    with pytest.raises((LoraError, AttributeError)):
        acts[name](model, folder)
    now, after = snapshot(model, folder.parent)
    assert after == before
    assert now.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(now[key].nan_to_num(7.0), tensor.nan_to_num(7.0)), key
