"""PEFT's rules for matching names, with PEFT itself as the reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lora.adapters.apply import applied_lora, apply_lora, lora_layers
from lora.adapters.peft_config import (
    PeftDescription,
    base_modules,
    describe_adapter,
    find_described,
    parse_description,
    read_description,
)
from lora.adapters.save_load import load_adapter, save_adapter
from lora.config import LoRAConfig
from lora.errors import AdapterError

NAMES = [
    "lm_head",
    "model.embed_tokens",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.10.mlp.experts.1.down_proj",
    "layers.1.q_proj",
    "1.q_proj",
    "q_proj",
    "my_q_proj",
    "encoder.h.2.attn.q_proj",
]
FRAGMENTS = st.sampled_from(
    ["q_proj", "v_proj", "self_attn.q_proj", "layers.1.q_proj", "1.q_proj", "lm_head", "mlp", "h.2"]
)
PATTERNS = st.sampled_from([r".*q_proj", r"model\..*", "q_proj", r".*\.1\..*", "lm_head|.*v_proj"])
FIELDS = st.fixed_dictionaries(
    {"target_modules": PATTERNS},
    optional={
        "exclude_modules": st.one_of(PATTERNS, st.lists(FRAGMENTS, min_size=1)),
        "modules_to_save": st.lists(FRAGMENTS, min_size=1),
    },
) | st.fixed_dictionaries(
    {"target_modules": st.lists(FRAGMENTS, min_size=1)},
    optional={
        "exclude_modules": st.one_of(PATTERNS, st.lists(FRAGMENTS, min_size=1)),
        "modules_to_save": st.lists(FRAGMENTS, min_size=1),
        "layers_to_transform": st.integers(0, 2) | st.lists(st.integers(0, 10)),
        "layers_pattern": st.sampled_from(["layers", "h", ["h", "layers"], [], "experts"]),
    },
)


def described(**fields: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | fields


def parsed(**fields: Any) -> PeftDescription:
    description, faults = parse_description(described(**fields))
    assert faults == []
    assert description is not None
    return description


@settings(max_examples=400, deadline=None)
@given(FIELDS)
def test_the_same_modules_are_adapted_as_in_peft(fields: dict[str, Any]) -> None:
    tuners_utils = pytest.importorskip("peft.tuners.tuners_utils")
    peft = pytest.importorskip("peft")
    if "layers_pattern" in fields and "layers_to_transform" not in fields:
        fields["layers_to_transform"] = [1]  # PEFT wants both
    config = peft.LoraConfig(**fields)
    ours = parsed(**fields)
    for name in NAMES:
        found = tuners_utils.check_target_module_exists(config, name)
        taken = bool(found) and not isinstance(found, tuners_utils._ExcludedModule)
        assert ours.takes(name) is taken, name


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            ["q_proj", "1.q_proj", "^q_proj", "layers.1.*q_proj", r"[qv]_proj", "proj"]
        ),
        st.integers(1, 9),
    )
)
def test_patterns_are_read_as_peft_reads_them(pattern: dict[str, int]) -> None:
    other = pytest.importorskip("peft.utils.other")
    ours = parsed(rank_pattern=pattern, alpha_pattern=pattern)
    for name in NAMES:
        value = pattern.get(other.get_pattern_key(pattern.keys(), name))
        assert ours.rank_of(name) == (4 if value is None else value)
        assert ours.alpha_of(name) == (8 if value is None else value)


def test_modules_to_save_are_found_by_any_ending() -> None:
    ours = parsed(modules_to_save=["tokens", "lm_head"])  # PEFT asks for no dot before it
    assert [name for name in NAMES if ours.saves(name)] == ["lm_head", "model.embed_tokens"]


def test_scaling_follows_patterns_and_rslora() -> None:
    pattern = {"rank_pattern": {"q_proj": 16}, "alpha_pattern": {"v_proj": 2}}
    assert parsed(**pattern).scaling_of("a.q_proj") == 0.5
    assert parsed(**pattern, use_rslora=True).scaling_of("a.q_proj") == 2.0
    assert parsed(**pattern, use_rslora=True).scaling_of("a.v_proj") == 1.0


@pytest.mark.parametrize("name", ["llama-untied", "llama-tied", "gpt2-tied"])
def test_all_linear_means_the_same_as_in_peft(
    name: str, tiny_model: Callable[[str], nn.Module]
) -> None:
    tuners_utils = pytest.importorskip("peft.tuners.tuners_utils")
    peft = pytest.importorskip("peft")
    model, ours = tiny_model(name), parsed(target_modules="all-linear")
    config = peft.LoraConfig(target_modules="all-linear")
    expected = tuners_utils._maybe_include_all_linear_layers(config, model).target_modules
    names, _, faults = find_described(model, ours)
    assert faults == []
    assert set(names) == expected
    without = parsed(target_modules="all-linear", exclude_modules=["q_proj", "c_attn"])
    fewer = {name for name in expected if not name.endswith(("q_proj", "c_attn"))}
    assert set(find_described(model, without)[0]) == fewer < expected
    apply_lora(model, LoRAConfig(rank=2))
    assert set(find_described(model, ours)[0]) == expected


LAYER = "model.layers.1.self_attn.q_proj"
ATTENTION = "model.layers.0.self_attn"


@pytest.mark.parametrize(
    ("options", "targets", "ranks"),
    [
        ({"targets": "q_proj"}, ["q_proj"], {}),
        ({"targets": ("q_proj", "lm_head")}, ["lm_head", "q_proj"], {}),
        ({"targets": LAYER}, [LAYER], {}),
        ({"targets": "q_proj", "layers": (1,)}, [LAYER], {}),
        ({"targets": "q_proj", "rank_pattern": {"q_proj": 3}}, ["q_proj"], {"q_proj": 3}),
        ({"targets": "q_proj", "rank_pattern": {LAYER: 3}}, ["q_proj"], {LAYER: 3}),
        ({"targets": r".*\.0\..*[kv]_proj"}, [f"{ATTENTION}.{p}_proj" for p in "kv"], {}),
    ],
)
def test_what_is_written_is_short_and_exact(
    options: dict[str, Any],
    targets: list[str],
    ranks: dict[str, int],
    tiny_model: Callable[[str], nn.Module],
) -> None:
    model = apply_lora(tiny_model("llama-untied"), LoRAConfig(rank=2, **options))
    content = describe_adapter(model, applied_lora(model), "base")
    assert content["target_modules"] == targets
    assert content["rank_pattern"] == ranks
    config, faults = read_description(content, tiny_model("llama-untied"))
    assert faults == []
    assert config is not None
    assert set(config.targets) == set(lora_layers(model))


def test_fields_for_other_tools(tiny_model: Callable[[str], nn.Module]) -> None:
    config = LoRAConfig(rank=2, alpha=4.0, dropout=0.1, modules_to_save=("wte",))
    model = apply_lora(tiny_model("gpt2-tied"), config)
    content = describe_adapter(model, applied_lora(model), "org/base")
    assert content["base_model_name_or_path"] == "org/base"
    assert content["task_type"] == "CAUSAL_LM"
    assert content["fan_in_fan_out"] is True
    assert content["modules_to_save"] == ["transformer.wte"]
    assert (content["r"], content["lora_alpha"], content["lora_dropout"]) == (2, 4, 0.1)
    assert isinstance(content["lora_alpha"], int)  # as PEFT's own type is
    model = apply_lora(tiny_model("llama-tied"), LoRAConfig(rank=2, alpha=4.5))
    content = describe_adapter(model, applied_lora(model), None)
    assert content["fan_in_fan_out"] is False
    assert content["lora_alpha"] == 4.5


def test_names_that_are_endings_of_others_are_written_as_a_pattern() -> None:
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "inner": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    apply_lora(model, LoRAConfig(rank=2, targets=r"(?:q)"))
    content = describe_adapter(model, applied_lora(model), None)
    assert content["target_modules"] == "(?:q)"
    plain = nn.ModuleDict({"q": nn.Linear(4, 4), "inner": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    names, _, faults = find_described(plain, parsed(target_modules="(?:q)"))
    assert names == ["q"]
    assert faults == []


@pytest.mark.parametrize("inner", ["inner", "z"])  # before and after "q" in the alphabet
def test_ranks_of_names_that_are_endings_of_others_stay_distinct(
    inner: str, tmp_path: Path
) -> None:
    def build() -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        model = nn.ModuleDict({"q": nn.Linear(8, 8), inner: nn.ModuleDict({"q": nn.Linear(8, 8)})})
        for parameter in model.parameters():
            nn.init.normal_(parameter, generator=generator)
        return model

    longer = f"{inner}.q"
    options = {"rank_pattern": {longer: 3, "q": 1}, "alpha_pattern": {longer: 48.0, "q": 4.0}}
    model = apply_lora(build(), LoRAConfig(rank=2, alpha=2.0, targets=("q",), **options))
    save_adapter(model, tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    for name, rank, scaling in (("q", 1, 4.0), (longer, 3, 16.0)):
        assert parsed(**content).rank_of(name) == rank
        assert parsed(**content).scaling_of(name) == scaling
    loaded = load_adapter(build(), tmp_path)
    for name, layer in lora_layers(model).items():
        assert lora_layers(loaded)[name].scaling == layer.scaling
        assert torch.equal(lora_layers(loaded)[name].lora_A, layer.lora_A)
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig.from_pretrained(tmp_path)
    config.task_type = None  # of language models
    theirs = peft.get_peft_model(build(), config)
    found = {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    assert found == {"q": 4.0, longer: 16.0}


def test_a_layer_whose_name_is_the_ending_of_anothers_is_adapted_alone(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.ModuleDict({"q": nn.Linear(4, 4), "z": nn.ModuleDict({"q": nn.Linear(4, 4)})})

    save_adapter(apply_lora(build(), LoRAConfig(rank=2, targets=r"(?:q)")), tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "adapter_model.safetensors")  # without the fingerprint
    assert list(lora_layers(load_adapter(build(), tmp_path))) == ["q"]


def test_what_pefts_rules_cannot_express_is_not_written() -> None:
    model = nn.ModuleDict(
        {"te": nn.Embedding(4, 4), "wte": nn.Embedding(4, 4), "q": nn.Linear(4, 4)}
    )
    apply_lora(model, LoRAConfig(rank=2, modules_to_save=("te",)))  # PEFT would take wte as well
    with pytest.raises(AdapterError, match=r"'wte' would be taken for a layer of similar name"):
        describe_adapter(model, applied_lora(model), None)


def test_what_is_inside_lora_layers_does_not_count(tiny_model: Callable[[str], nn.Module]) -> None:
    plain = list(base_modules(tiny_model("llama-tied")))
    adapted = apply_lora(tiny_model("llama-tied"), LoRAConfig(rank=2, dropout=0.1))
    assert list(base_modules(adapted)) == plain


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_modules": ["qproj"]}, "target_modules=('qproj',) matches no layer"),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            "'model.embed_tokens' is of type Embedding",
        ),
        ({"target_modules": ["q_proj", "mlp"]}, "'model.layers.0.mlp' is of type LlamaMLP"),
        ({"modules_to_save": ["embd_tokens"]}, "Did you mean 'embed_tokens'?"),
        ({"exclude_modules": ["q_proj"]}, "matches no layer"),
        ({"layers_to_transform": [7]}, "matches no layer"),
    ],
)
def test_names_that_do_not_fit_the_model_are_faults(
    fields: dict[str, Any], words: str, tiny_model: Callable[[str], nn.Module]
) -> None:
    config, faults = read_description(described(**fields), tiny_model("llama-tied"))
    assert config is None
    assert words in "\n".join(faults)
