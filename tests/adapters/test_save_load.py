"""Adapters in PEFT's format: either side loads the other's; misfits are refused."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora.adapters.apply import applied_lora, apply_lora, lora_layers, remove_lora
from lora.adapters.save_load import load_adapter, read_adapter_config, save_adapter
from lora.config import LoRAConfig
from lora.errors import AdapterError, CheckpointError, ModelError, TargetError
from lora.pretrained.hf_weights import load_decoder

Fill = Callable[..., nn.Module]
Build = Callable[[str], nn.Module]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
LLAMA_Q = "model.layers.1.self_attn.q_proj"

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    f"{model}: {what}": (model, options)
    for models, what, options in [
        (("llama-tied", "llama-untied", "gpt2-tied", "gpt2-untied"), "all linear", {}),
        (("llama-tied", "gpt2-tied"), "rslora", {"rslora": True, "alpha": 5.5}),
        (("llama-tied",), "blocks", {"layers": (1,)}),
        (("llama-tied",), "pattern", {"targets": r".*layers\.0\..*(q|down)_proj"}),
        (
            ("llama-untied",),
            "ranks and alphas",
            {"rank_pattern": {LLAMA_Q: 2, "mlp.down_proj": 3}, "alpha_pattern": {"q_proj": 3.0}},
        ),
        (
            ("llama-tied", "llama-untied"),
            "head",
            {"targets": ("q_proj", "down_proj", "lm_head"), "rank_pattern": {"lm_head": 7}},
        ),
        (("gpt2-tied", "gpt2-untied"), "head", {"targets": ("c_attn", "c_proj", "lm_head")}),
        (("llama-tied", "llama-untied"), "embedding", {"modules_to_save": ("embed_tokens",)}),
        (("gpt2-tied",), "embedding", {"modules_to_save": ("wte", "wpe", "ln_f")}),
        (
            ("llama-tied", "llama-untied"),
            "embedding and head fully trained",
            {"modules_to_save": ("embed_tokens", "lm_head", "model.norm")},
        ),
        (
            ("llama-tied", "llama-untied"),
            "embedding whole, head adapted",
            {"targets": ("v_proj", "lm_head"), "modules_to_save": ("embed_tokens",)},
        ),
        (
            ("llama-tied",),
            "a container whole",
            {"targets": ("q_proj",), "modules_to_save": ("layers.1.mlp",)},
        ),
    ]
    for model in models
} | {"llama-untied: a rank above a side": ("llama-untied", {"rank": 40})}


@pytest.fixture
def adapted(tiny_model: Build, fill_random: Fill) -> Callable[..., nn.Module]:
    """Return a function: name and settings → an adapted model, its trainable tensors random."""

    def build(name: str = "llama-tied", **options: Any) -> nn.Module:
        model = apply_lora(tiny_model(name), LoRAConfig(**{"rank": 4} | options))
        return fill_random(model, 5, only_trainable=True, std=0.3)

    return build


@pytest.fixture
def folder(adapted: Callable[..., nn.Module], tmp_path: Path) -> Path:
    """An adapter of q_proj with a fully trained embedding."""
    save_adapter(adapted(targets="q_proj", modules_to_save=("embed_tokens",)), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def peft() -> Iterator[Any]:
    module = pytest.importorskip("peft")
    with warnings.catch_warnings():
        # Of PEFT itself; warnings about keys that do not fit stay errors.
        for words in (
            "`is_gradient_checkpointing` is deprecated",
            "Model has `tie_word_embeddings=True` and a tied layer",
            "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`",
            "fan_in_fan_out is set to False but the target module is `Conv1D`",
            "Setting `save_embedding_layers` to `True` as embedding layers found",
        ):
            warnings.filterwarnings("ignore", message=words.replace("(", r"\("))
        yield module


def edit(folder: Path, **fields: Any) -> None:
    described = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(described | fields))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    with safe_open(folder / TENSORS, framework="pt") as file:
        metadata = file.metadata()
    metadata.pop("lora_lm_tensors_sha256", None)  # as another program would write them
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata)


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """Everything that a failed load must not change."""
    return (
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [(n, id(p), p.requires_grad, p.sum().item()) for n, p in model.named_parameters()],
        sorted(vars(model)),
    )


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_we_save(
    case: str,
    adapted: Callable[..., nn.Module],
    tiny_model: Build,
    token_ids: Tensor,
    tmp_path: Path,
    peft: Any,
) -> None:
    name, options = CASES[case]
    ours = adapted(name, **options)
    save_adapter(ours, tmp_path, base_name="some/base")
    theirs = peft.PeftModel.from_pretrained(tiny_model(name), tmp_path)  # warns of missing keys
    result = theirs.load_adapter(tmp_path, "second")
    theirs.set_adapter("second")
    assert result.missing_keys == []
    assert result.unexpected_keys == []
    assert theirs.peft_config["default"].base_model_name_or_path == "some/base"
    expected = ours(token_ids).logits
    assert close(theirs(token_ids).logits, expected)
    assert not close(expected, tiny_model(name)(token_ids).logits)


@pytest.mark.parametrize("case", CASES)
def test_we_load_what_peft_saves(
    case: str, tiny_model: Build, fill_random: Fill, token_ids: Tensor, tmp_path: Path, peft: Any
) -> None:
    name, options = CASES[case]
    config = LoRAConfig(**{"rank": 4} | options)
    targets = config.targets
    if config.layers is not None:
        targets = ["q_proj", "up_proj"]
    theirs = peft.get_peft_model(
        tiny_model(name),
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=config.rank,
            lora_alpha=config.alpha,
            target_modules=targets if isinstance(targets, str) else list(targets),
            modules_to_save=list(config.modules_to_save) or None,
            use_rslora=config.rslora,
            layers_to_transform=list(config.layers) if config.layers else None,
            rank_pattern=config.rank_pattern,
            alpha_pattern=config.alpha_pattern,
        ),
    )
    fill_random(theirs, 6, only_trainable=True, std=0.3)
    theirs.eval().save_pretrained(tmp_path)
    ours = load_adapter(tiny_model(name), tmp_path)
    assert close(ours(token_ids).logits, theirs(token_ids).logits)
    assert not close(ours(token_ids).logits, tiny_model(name)(token_ids).logits)


@pytest.mark.parametrize("case", CASES)
def test_save_load_save_is_byte_equal(
    case: str,
    adapted: Callable[..., nn.Module],
    tiny_model: Build,
    token_ids: Tensor,
    tmp_path: Path,
) -> None:
    name, options = CASES[case]
    first = adapted(name, **options)
    save_adapter(first, tmp_path / "1")
    second = load_adapter(tiny_model(name), tmp_path / "1")
    save_adapter(second, tmp_path / "2")
    assert torch.equal(first(token_ids).logits, second(token_ids).logits)
    for file in (CONFIG, TENSORS):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()
    third = load_adapter(adapted(name, **options), tmp_path / "2")  # one that has LoRA already
    assert torch.equal(first(token_ids).logits, third(token_ids).logits)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama-tied", {"modules_to_save": ("embed_tokens",)}),
        ("llama-untied", {"modules_to_save": ("embed_tokens",)}),
        ("gpt2-tied", {"modules_to_save": ("wte",)}),
        # Conv1D, square and not, one by one and in a container: files hold them transposed.
        ("gpt2-tied", {"targets": ("c_attn",), "modules_to_save": ("c_proj", "c_fc")}),
        ("gpt2-untied", {"targets": ("c_fc",), "modules_to_save": ("attn",)}),
    ],
)
def test_our_decoder_takes_the_same_adapter(
    name: str,
    options: dict[str, Any],
    adapted: Callable[..., nn.Module],
    tiny_model: Build,
    token_ids: Tensor,
    tmp_path: Path,
) -> None:
    tiny_model(name).save_pretrained(tmp_path / "model")  # type: ignore[operator]
    model = adapted(name, **options)
    save_adapter(model, tmp_path / "adapter")
    decoder = load_adapter(load_decoder(tmp_path / "model"), tmp_path / "adapter")
    with torch.no_grad():
        assert close(decoder(token_ids), model(token_ids).logits)
    save_adapter(decoder, tmp_path / "again")
    there, back = load_file(tmp_path / "adapter" / TENSORS), load_file(tmp_path / "again" / TENSORS)
    assert there.keys() == back.keys()
    assert all(torch.equal(there[key], back[key]) for key in there)
    again = load_adapter(tiny_model(name), tmp_path / "again")
    assert torch.equal(again(token_ids).logits, model(token_ids).logits)


def test_an_adapter_is_fp32_on_a_bf16_base_too(
    adapted: Callable[..., nn.Module], tiny_model: Build, tmp_path: Path
) -> None:
    fp32 = adapted(targets="q_proj")
    save_adapter(fp32, tmp_path / "fp32")
    bf16 = load_adapter(tiny_model("llama-tied").bfloat16(), tmp_path / "fp32")
    wide, narrow = (lora_layers(m)[LLAMA_Q].lora_A for m in (fp32, bf16))
    assert narrow.dtype is torch.float32
    assert torch.equal(narrow, wide)
    edit_tensors(tmp_path / "fp32", lambda ts: ts.update({k: t.half() for k, t in ts.items()}))
    half = load_adapter(tiny_model("llama-tied"), tmp_path / "fp32")
    assert torch.equal(lora_layers(half)[LLAMA_Q].lora_A, wide.half().float())


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("has_lora", [False, True])
def test_what_trains_after_loading(
    trainable: bool,
    has_lora: bool,
    folder: Path,
    adapted: Callable[..., nn.Module],
    tiny_model: Build,
) -> None:
    model = tiny_model("llama-tied")
    if has_lora:
        model = adapted(targets="q_proj", modules_to_save=("embed_tokens",)).requires_grad_(False)
        model.get_parameter("model.norm.weight").requires_grad_(True)  # frozen with the rest
    assert load_adapter(model, folder, trainable=trainable) is model
    trained = {
        n.rpartition("self_attn.")[2] for n, p in model.named_parameters() if p.requires_grad
    }
    expected = {"q_proj.lora_A", "q_proj.lora_B", "model.embed_tokens.weight"}
    assert trained == (expected if trainable else set())
    assert model.get_parameter("lm_head.weight") is not model.get_parameter(
        "model.embed_tokens.weight"
    )


def test_loading_leaves_torchs_generator_alone(folder: Path, tiny_model: Build) -> None:
    model, state = tiny_model("llama-tied"), torch.get_rng_state()
    load_adapter(model, folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert applied_lora(model).config.init_seed is None


def test_a_loaded_adapter_can_be_taken_off(
    folder: Path, tiny_model: Build, token_ids: Tensor
) -> None:
    model = tiny_model("llama-tied")
    before = model(token_ids).logits
    assert not torch.equal(load_adapter(model, folder)(token_ids).logits, before)
    assert torch.equal(remove_lora(model)(token_ids).logits, before)


def test_settings_without_a_model(
    adapted: Callable[..., nn.Module], tiny_model: Build, tmp_path: Path
) -> None:
    options = {
        "targets": ("q_proj", "lm_head"),
        "alpha": 6.0,
        "dropout": 0.25,
        "rslora": True,
        "rank_pattern": {LLAMA_Q: 2},
        "modules_to_save": ("embed_tokens",),
    }
    save_adapter(adapted(**options), tmp_path)
    config = read_adapter_config(tmp_path)
    assert (config.rank, config.alpha, config.dropout, config.rslora) == (4, 6.0, 0.25, True)
    assert set(config.targets) == {LLAMA_Q, LLAMA_Q.replace("1", "0"), "lm_head"}
    assert config.rank_pattern == {LLAMA_Q: 2}
    model = apply_lora(tiny_model("llama-tied"), config)
    assert {n: x.rank for n, x in lora_layers(model).items()}["lm_head"] == 4
    load_adapter(model, tmp_path)


def test_settings_of_a_damaged_adapter_are_refused(folder: Path) -> None:
    (folder / TENSORS).write_bytes(b"oops")
    edit(folder, use_dora=True)
    with pytest.raises(AdapterError) as caught:
        read_adapter_config(folder)
    assert "is damaged" in str(caught.value)
    assert "DoRA" in str(caught.value)


def test_settings_of_an_adapter_without_layers_are_refused(folder: Path) -> None:
    edit_tensors(folder, lambda t: [t.pop(key) for key in list(t) if "lora_A" in key])
    with pytest.raises(
        AdapterError, match=r"no tensor has a name base_model.model.….lora_A.weight"
    ):
        read_adapter_config(folder)


def test_a_plain_model_has_nothing_to_save(tiny_model: Build, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="has no LoRA"):
        save_adapter(tiny_model("llama-tied"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite_are_not_saved(
    adapted: Callable[..., nn.Module], folder: Path
) -> None:
    before = (folder / TENSORS).read_bytes()
    model = adapted(targets="q_proj")
    with torch.no_grad():
        lora_layers(model)[LLAMA_Q].lora_B[0, 0] = torch.nan
    with pytest.raises(AdapterError, match=r"q_proj.lora_B.weight has values that are not finite"):
        save_adapter(model, folder)
    assert (folder / TENSORS).read_bytes() == before


def test_a_folder_that_cannot_be_written_is_refused(
    adapted: Callable[..., nn.Module], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot write"):
        save_adapter(adapted(targets="q_proj"), tmp_path / "file")


def test_another_base_is_refused(
    folder: Path, tiny_model: Build, adapted: Callable[..., nn.Module]
) -> None:
    edit(folder, base_model_name_or_path="some/base")
    model = tiny_model("llama-tied")
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] += 1
    before = state_of(model)
    with pytest.raises(AdapterError, match=r"a base \(some/base\) with fingerprint [0-9a-f]{32},"):
        load_adapter(model, folder)
    assert state_of(model) == before


def test_a_base_that_cannot_be_checked_is_logged(
    folder: Path, tiny_model: Build, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        load_adapter(tiny_model("llama-tied"), folder)
        assert caplog.messages == []
        save_file(load_file(folder / TENSORS), folder / TENSORS)  # no metadata at all
        load_adapter(tiny_model("llama-tied"), folder)
    assert caplog.messages == [f"{folder} has no base fingerprint: the base could not be checked"]


def test_a_model_without_values_is_refused(folder: Path, tiny_model: Build) -> None:
    with pytest.raises(ModelError, match="Load the weights first"):
        load_adapter(tiny_model("llama-tied").to("meta"), folder)


PREFIX = f"base_model.model.{LLAMA_Q}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{PREFIX}.lora_B.weight"), rf"missing: {PREFIX}.lora_B.weight \(32, 4\)"),
        (
            lambda t: t.update({f"{PREFIX}.lora_magnitude_vector": torch.ones(4)}),
            "not of this model: .*lora_magnitude_vector",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)}),
            "not of this model: base_model.model.lm_head.lora_A.weight",
        ),
        (
            lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.ones(5, 32)}),
            r"lora_A.weight has shape \(5, 32\), the model needs \(4, 32\)",
        ),
        (
            lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.ones(4, 32, 1)}),
            r"has shape \(4, 32, 1\), the model needs \(4, 32\)",
        ),
        (
            lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)}),
            "lora_A.weight is torch.int8, allowed are fp32, bf16, fp16",
        ),
        (lambda t: t[f"{PREFIX}.lora_A.weight"].fill_(torch.inf), "lora_A.weight has values that"),
        (
            lambda t: t["base_model.model.model.embed_tokens.weight"][3].fill_(torch.nan),
            "embed_tokens.weight has values that are not finite in torch.float32",
        ),
        (
            lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(32)}),
            "norm.weight is a weight of the base, and its values differ",
        ),
        (
            lambda t: t.update({"../../../etc/passwd": torch.ones(3)}),
            "not of this model: ../../../etc/passwd",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Tensor]], object], words: str, folder: Path, tiny_model: Build
) -> None:
    edit_tensors(folder, change)
    model = tiny_model("llama-tied").train()
    model.get_parameter("model.norm.weight").requires_grad_(False)
    before = state_of(model)
    with pytest.raises(AdapterError, match=words):
        load_adapter(model, folder)
    assert state_of(model) == before


def test_values_too_large_for_the_models_type_are_refused(folder: Path, tiny_model: Build) -> None:
    name = f"{PREFIX}.lora_A.weight"
    edit_tensors(folder, lambda t: t.update({name: torch.full_like(t[name].double(), 1e300)}))
    with pytest.raises(AdapterError, match=r"not finite in torch\.float32"):
        load_adapter(tiny_model("llama-tied").half(), folder)


def test_copies_of_the_bases_own_weights_are_accepted(
    folder: Path, tiny_model: Build, token_ids: Tensor
) -> None:
    model = tiny_model("llama-tied")
    norm = model.get_parameter("model.norm.weight").detach().clone()
    expected = load_adapter(tiny_model("llama-tied"), folder)(token_ids).logits
    edit_tensors(folder, lambda t: t.update({"base_model.model.model.norm.weight": norm}))
    assert torch.equal(load_adapter(model, folder)(token_ids).logits, expected)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, "missing: .*v_proj.lora_A.weight"),
        ({"target_modules": ["v_proj"]}, "not of this model: .*q_proj.lora_A.weight"),
        ({"layers_to_transform": [0]}, "not of this model: .*layers.1.*lora_A"),
        ({"exclude_modules": "model.layers.1.*"}, "not of this model: .*layers.1.*lora_A"),
        (
            {"modules_to_save": None},
            "embed_tokens.weight is a weight of the base, and its values differ",
        ),
        ({"modules_to_save": ["embed_tokens", "norm"]}, "missing: .*model.norm.weight"),
        ({"r": 3}, r"has shape \(4, 32\), the model needs \(3, 32\)"),
        ({"rank_pattern": {"q_proj": 3}}, r"the model needs \(3, 32\)"),
        ({"r": 33}, r"has shape \(4, 32\), the model needs \(33, 32\)"),
        ({"use_dora": True}, "DoRA scales each column"),
        ({"bias": "all"}, "the base's biases were trained too"),
        ({"a_new_switch": True}, "a_new_switch=True: this field is unknown"),
        ({"peft_type": "IA3"}, "peft_type='IA3': allowed is 'LORA'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    fields: dict[str, Any], words: str, folder: Path, tiny_model: Build
) -> None:
    edit(folder, **fields)
    model = tiny_model("llama-tied")
    before = state_of(model)
    with pytest.raises(AdapterError, match=words) as caught:
        load_adapter(model, folder)
    assert "Cannot load the adapter" in str(caught.value)
    assert "Load it onto the base it was trained on" in str(caught.value)
    assert state_of(model) == before


def test_settings_that_change_the_result_are_honoured(
    folder: Path, tiny_model: Build, peft: Any, token_ids: Tensor
) -> None:
    seen = []
    for fields in (
        {},
        {"lora_alpha": 3},
        {"use_rslora": True},
        {"alpha_pattern": {r"layers\.1\..*": 1}},
    ):
        edit(folder, **fields)
        ours = load_adapter(tiny_model("llama-tied"), folder)(token_ids).logits
        theirs = peft.PeftModel.from_pretrained(tiny_model("llama-tied"), folder)
        assert close(ours, theirs(token_ids).logits)
        assert not any(close(ours, other) for other in seen)
        seen.append(ours)


def test_all_faults_come_together(folder: Path, tiny_model: Build) -> None:
    edit_tensors(folder, lambda t: t.pop(f"{PREFIX}.lora_B.weight"))
    edit_tensors(folder, lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.ones(4, 9)}))
    edit_tensors(folder, lambda t: t.update({"stray": torch.ones(1)}))
    model = tiny_model("llama-tied")
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] += 1
    with pytest.raises(AdapterError) as caught:
        load_adapter(model, folder)
    for words in ("fingerprint", "missing: ", "(4, 9)", "not of this model: stray"):
        assert words in str(caught.value)


def test_damaged_tensors_and_wrong_settings_come_together(folder: Path, tiny_model: Build) -> None:
    (folder / TENSORS).write_bytes(b"oops")
    edit(folder, use_dora=True)
    with pytest.raises(AdapterError) as caught:
        load_adapter(tiny_model("llama-tied"), folder)
    assert "is damaged" in str(caught.value)
    assert "DoRA" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ("q_proj", "v_proj")}, "adapted on the model, not in the file: .*v_proj"),
        ({"targets": LLAMA_Q}, "in the file, not adapted on the model: .*layers.0"),
        ({"rank": 2}, "rank 4 and scaling 4 in the file, rank 2 and scaling 8 on the model"),
        ({"alpha": 3.0}, "scaling 4 in the file, rank 4 and scaling 0.75 on the model"),
        ({"rslora": True}, "scaling 4 in the file, rank 4 and scaling 8 on the model"),
        (
            {"modules_to_save": ()},
            "fully trained in the file, not on the model: model.embed_tokens",
        ),
    ],
)
def test_lora_of_other_settings_on_the_model_is_refused(
    options: dict[str, Any], words: str, folder: Path, adapted: Callable[..., nn.Module]
) -> None:
    model = adapted(**{"targets": "q_proj", "modules_to_save": ("embed_tokens",)} | options)
    before = state_of(model)
    with pytest.raises(AdapterError, match=words):
        load_adapter(model, folder)
    assert state_of(model) == before


@pytest.mark.parametrize("prefix", ["", "base_model.model.base_model.model.", "module."])
def test_other_prefixes_of_names_are_named(prefix: str, folder: Path, tiny_model: Build) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name.removeprefix("base_model.model.")] = tensors.pop(name)

    edit_tensors(folder, rename)
    with pytest.raises(AdapterError, match="its tensors' names begin with") as caught:
        load_adapter(tiny_model("llama-tied"), folder)
    assert str(caught.value).count("  - ") == 1


def test_norms_by_ending_are_those_of_peft_in_our_decoder_too(
    tiny_model: Build, fill_random: Fill, token_ids: Tensor, tmp_path: Path, peft: Any
) -> None:
    tiny_model("llama-tied").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"])
    theirs = peft.get_peft_model(tiny_model("llama-tied"), config)
    fill_random(theirs, 6, only_trainable=True, std=0.3)
    theirs.eval().save_pretrained(tmp_path / "adapter")
    decoder = load_adapter(load_decoder(tmp_path / "model"), tmp_path / "adapter")
    assert len(applied_lora(decoder).originals) == 5  # "norm" ends input_layernorm as well
    with torch.no_grad():
        assert close(decoder(token_ids), theirs(token_ids).logits)


def test_names_with_the_adapters_name_are_read(
    folder: Path, tiny_model: Build, token_ids: Tensor
) -> None:
    wanted = load_adapter(tiny_model("llama-tied"), folder)(token_ids).logits

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[re.sub(r"(lora_[AB])", r"\1.default", name)] = tensors.pop(name)

    edit_tensors(folder, rename)
    assert torch.equal(load_adapter(tiny_model("llama-tied"), folder)(token_ids).logits, wanted)
    key = f"base_model.model.{LLAMA_Q}.lora_A.weight"
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.ones(4, 32)}))
    with pytest.raises(AdapterError, match="is there twice, and its values differ"):
        load_adapter(tiny_model("llama-tied"), folder)


def test_a_copy_of_a_bf16_base_is_the_fp32_bases(
    adapted: Callable[..., nn.Module], tiny_model: Build, tmp_path: Path
) -> None:
    save_adapter(adapted("llama-untied", targets=("q_proj", "lm_head")), tmp_path)
    embedding = tiny_model("llama-untied").get_parameter("model.embed_tokens.weight").detach()
    key = "base_model.model.model.embed_tokens.weight"
    edit_tensors(tmp_path, lambda tensors: tensors.update({key: embedding.bfloat16()}))
    load_adapter(tiny_model("llama-untied"), tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({key: embedding.bfloat16() + 1}))
    with pytest.raises(AdapterError, match="its values differ from this base's"):
        load_adapter(tiny_model("llama-untied"), tmp_path)


def test_a_classifier_of_peft_comes_back(fill_random: Fill, tmp_path: Path, peft: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    ids = torch.tensor([[1, 7, 3, 5]])

    def build() -> nn.Module:
        return fill_random(transformers.LlamaForSequenceClassification(config), 0).eval()

    theirs = peft.get_peft_model(build(), peft.LoraConfig(task_type="SEQ_CLS", r=4))
    fill_random(theirs, 6, only_trainable=True, std=0.3).eval().save_pretrained(tmp_path / "1")
    ours = load_adapter(build(), tmp_path / "1")
    assert close(ours(ids).logits, theirs(ids).logits)
    save_adapter(ours, tmp_path / "2")
    assert json.loads((tmp_path / "2" / CONFIG).read_text())["task_type"] == "SEQ_CLS"
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "2")
    assert close(ours(ids).logits, again(ids).logits)


def test_weight_tying_is_refused_only_where_it_has_an_effect(
    folder: Path, adapted: Callable[..., nn.Module], tiny_model: Build, tmp_path: Path
) -> None:
    edit(folder, ensure_weight_tying=True)
    with pytest.raises(AdapterError, match="would share one trained copy"):
        load_adapter(tiny_model("llama-tied"), folder)
    save_adapter(adapted(targets="q_proj"), tmp_path / "plain")
    edit(tmp_path / "plain", ensure_weight_tying=True)
    load_adapter(tiny_model("llama-tied"), tmp_path / "plain")


def test_falcons_linears_are_adapted_and_saved_as_peft_has_them(
    fill_random: Fill, tmp_path: Path, peft: Any
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.FalconConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=64, bias=True
    )
    ids = torch.tensor([[1, 7, 3, 5]])

    def build() -> nn.Module:
        return fill_random(transformers.FalconForCausalLM(config), 0).eval()

    ours = apply_lora(build(), LoRAConfig(rank=4))
    assert any("query_key_value" in name for name in lora_layers(ours))
    fill_random(ours, 6, only_trainable=True, std=0.3)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path)
    assert close(ours(ids).logits, theirs(ids).logits)
