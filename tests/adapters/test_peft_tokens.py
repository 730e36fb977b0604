"""Trainable tokens in PEFT's format: either side loads what the other saves, with equal logits."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora.adapters import save_load
from lora.adapters.apply import applied_lora, apply_lora, remove_lora, train_token_rows
from lora.adapters.fingerprint import base_fingerprint
from lora.adapters.merge import merge_lora
from lora.adapters.save_load import load_adapter, save_adapter
from lora.config import LoRAConfig
from lora.errors import AdapterError, TargetError
from lora.pretrained.hf_weights import load_decoder

Fill = Callable[..., nn.Module]
Build = Callable[[str], nn.Module]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
DELTA = "token_adapter.trainable_tokens_delta"
VOCAB = 64
IDS = [7, VOCAB, VOCAB + 1]
TOKENS = torch.tensor([[1, 7, VOCAB, 3, VOCAB + 1, 5], [VOCAB + 1, 2, 2, 7, 60, 63]])
LAYOUTS = ("llama-tied", "llama-untied")
MEAN = "ignore:.*embedding.*mean_resizing"


@pytest.fixture
def base(tiny_model: Build, tmp_path: Path) -> Callable[[str], Path]:
    def save(name: str) -> Path:
        tiny_model(name).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def folder(base: Callable[[str], Path], fill_random: Fill, tmp_path: Path) -> Path:
    """An adapter with trained tokens for a tied Llama, in the folder beside its base."""
    save_adapter(adapted(base("llama-tied"), fill_random), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def peft() -> Iterator[Any]:
    module = pytest.importorskip("peft")
    with warnings.catch_warnings():  # of PEFT itself; those about keys stay errors
        for words in (
            "`is_gradient_checkpointing` is deprecated",
            "Model has `tie_word_embeddings=True` and a tied layer",
            "Setting `save_embedding_layers` to `True` as the embedding layer has been resized",
        ):
            warnings.filterwarnings("ignore", message=words)
        yield module


def adapted(base_folder: Path, fill_random: Fill, ids: Any = IDS) -> nn.Module:
    model = apply_lora(load_decoder(base_folder), LoRAConfig(rank=4))
    train_token_rows(model, ids)
    return fill_random(model, 5, only_trainable=True, std=0.3).eval()


def edit(folder: Path, **fields: Any) -> None:
    described = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(described | fields))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    with safe_open(folder / TENSORS, framework="pt") as file:
        metadata = file.metadata()
    metadata.pop("lora_lm_tensors_sha256", None)  # as another program would write them
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata)


def ours(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)


def theirs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_peft_loads_what_we_save(
    layout: str, base: Callable[[str], Path], fill_random: Fill, peft: Any, tmp_path: Path
) -> None:
    import transformers

    model = adapted(base(layout), fill_random)
    save_adapter(model, tmp_path / "adapter")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / layout)
    reference.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
    config = peft.LoraConfig.from_pretrained(tmp_path / "adapter")
    wrapped = peft.get_peft_model(reference, config)
    told = peft.set_peft_model_state_dict(wrapped, load_file(tmp_path / "adapter" / TENSORS))
    assert told.unexpected_keys == []
    assert (theirs(wrapped.eval()) - ours(model)).abs().max() <= 1e-5
    wrapped.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    names = set(load_file(tmp_path / "again" / TENSORS))
    assert names == set(load_file(tmp_path / "adapter" / TENSORS))
    # What PEFT counts as missing in our file it misses in its own (the base, a tied head's rows).
    own = peft.set_peft_model_state_dict(wrapped, load_file(tmp_path / "again" / TENSORS))
    assert set(told.missing_keys) == set(own.missing_keys)


@pytest.mark.parametrize("is_local", [False, True], ids=["rows only", "with copies of tables"])
@pytest.mark.parametrize("indices", [IDS, {"embed_tokens": IDS, "lm_head": IDS}], ids=type)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_we_load_what_peft_saves(
    layout: str,
    indices: Any,
    is_local: bool,
    base: Callable[[str], Path],
    fill_random: Fill,
    peft: Any,
    tmp_path: Path,
) -> None:
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(base(layout))
    reference.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", trainable_token_indices=indices, task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(reference, config)
    fill_random(wrapped, 6, only_trainable=True, std=0.3)
    # The copies of whole tables that PEFT adds if it finds the base's config.
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=is_local)
    model = load_adapter(load_decoder(tmp_path / layout), tmp_path / "adapter").eval()
    assert model.config.vocab_size == VOCAB + 2
    expected, seen = theirs(wrapped.eval()), ours(model)
    if layout == "llama-untied" and isinstance(indices, list) and not is_local:
        # The head's new rows are in no file: theirs are random, ours the mean.
        expected, seen = expected[..., :VOCAB], seen[..., :VOCAB]
    assert (expected - seen).abs().max() <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_save_load_save_gives_the_same_bytes(
    layout: str, base: Callable[[str], Path], fill_random: Fill, tmp_path: Path
) -> None:
    model = adapted(base(layout), fill_random)
    save_adapter(model, tmp_path / "one")
    again = load_adapter(load_decoder(tmp_path / layout), tmp_path / "one").eval()
    assert torch.equal(ours(model), ours(again))
    save_adapter(again, tmp_path / "two")
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    described = json.loads((tmp_path / "one" / CONFIG).read_text())
    by_module = {"embed_tokens": IDS, "lm_head": IDS}
    assert described["trainable_token_indices"] == (IDS if "untied" not in layout else by_module)


def test_the_fingerprint_is_that_of_the_base_before_it_grew(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_decoder(folder.parent / "llama-tied")
    before = base_fingerprint(model)
    with caplog.at_level(logging.WARNING):
        load_adapter(model, folder)
    assert "the vocabulary grows from 64 to 66" in caplog.text
    assert base_fingerprint(model) == before
    assert base_fingerprint(remove_lora(model)) == before
    with torch.no_grad():
        model.get_submodule("model.embed_tokens").weight[0] += 1
    with pytest.raises(AdapterError, match="fingerprint"):
        load_adapter(model, folder)


def test_an_adapted_model_is_filled_again(folder: Path, fill_random: Fill) -> None:
    model = load_adapter(load_decoder(folder.parent / "llama-tied"), folder, trainable=True)
    wanted = ours(model)
    assert model.get_submodule("lm_head").token_rows.requires_grad
    fill_random(model, 9, only_trainable=True)
    load_adapter(model, folder)
    assert torch.equal(ours(model), wanted)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"trainable_token_indices": [7, 7]}, "ids ≥ 0, each once"),
        ({"trainable_token_indices": {"norm": [3]}}, "Allowed: model.embed_tokens, lm_head"),
        (
            {"trainable_token_indices": [7, 64, 10**9]},
            "token id 1,000,000,000, allowed are ids below",
        ),
        ({"trainable_token_indices": [7, 64]}, "has shape"),
        ({"trainable_token_indices": None}, "not of this model"),
        ({"modules_to_save": ["embed_tokens"]}, "is also a target or in modules_to_save"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_unchanged(
    folder: Path, fields: dict[str, Any], words: str
) -> None:
    edit(folder, **fields)
    model = load_decoder(folder.parent / "llama-tied")
    with pytest.raises(AdapterError, match=words):
        load_adapter(model, folder)
    assert model.config.vocab_size == VOCAB
    assert "applied_lora" not in vars(model)


def test_faults_of_the_tensors_are_gathered(folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        rows = tensors.pop(f"base_model.model.model.embed_tokens.{DELTA}")
        tensors[f"base_model.model.model.norm.{DELTA}"] = rows

    change_tensors(folder, spoil)
    with pytest.raises(
        AdapterError, match=r"(?s)missing: .*embed_tokens.*not of this model: .*norm"
    ):
        load_adapter(load_decoder(folder.parent / "llama-tied"), folder)


GROWN: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA alone, tied": ("llama-tied", {}),
    "LoRA alone, untied": ("llama-untied", {}),
    "tables in full, tied": ("llama-tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tables in full, untied": ("llama-untied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "embedding in full": ("llama-untied", {"modules_to_save": ["embed_tokens"]}),
    "LoRA on the head": ("llama-untied", {"target_modules": ["q_proj", "lm_head"]}),
    "rows of the embedding": ("llama-untied", {"trainable_token_indices": IDS}),
    "rows of the head": ("llama-untied", {"trainable_token_indices": {"lm_head": IDS}}),
    "rows, and LoRA on the head": (
        "llama-untied",
        {"trainable_token_indices": IDS, "target_modules": ["q_proj", "lm_head"]},
    ),
}


@pytest.mark.filterwarnings(MEAN)
@pytest.mark.parametrize("case", GROWN)
def test_a_vocabulary_that_peft_resized_comes_back_and_is_kept(
    case: str,
    base: Callable[[str], Path],
    tiny_model: Build,
    fill_random: Fill,
    peft: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    layout, options = GROWN[case]
    model = tiny_model(layout)
    model.resize_token_embeddings(VOCAB + 2)  # type: ignore[operator]
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):  # type: ignore[operator]
            table.weight[VOCAB:] = torch.randn(2, 32, generator=torch.Generator().manual_seed(4))
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": ["q_proj"]} | options)
    adapted_by_peft = fill_random(
        peft.get_peft_model(model, config), 6, only_trainable=True, std=0.3
    ).eval()
    adapted_by_peft.save_pretrained(tmp_path / "peft", save_embedding_layers=True)
    tokens = TOKENS
    if case == "LoRA on the head":  # PEFT then leaves the embedding's new rows out of the file
        tokens = TOKENS.clamp(max=VOCAB - 1)
    with torch.no_grad():
        wanted = adapted_by_peft(tokens).logits
    trained = load_adapter(load_decoder(base(layout)), tmp_path / "peft", trainable=True)
    assert f"grows from {VOCAB} to {VOCAB + 2}" in caplog.text
    assert ("new rows of model.embed_tokens" in caplog.text) == (case == "LoRA on the head")
    with torch.no_grad():
        assert (trained(tokens) - wanted).abs().max() <= 1e-5
    save_adapter(trained, tmp_path / "again")
    loaded = load_adapter(load_decoder(tmp_path / layout), tmp_path / "again")
    assert torch.equal(ours(loaded), ours(trained))
    assert base_fingerprint(loaded) == base_fingerprint(load_decoder(tmp_path / layout))
    remove_lora(loaded)
    assert loaded.config.vocab_size == VOCAB


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
def test_new_rows_in_one_table_only_come_back(
    name: str, base: Callable[[str], Path], fill_random: Fill, tmp_path: Path
) -> None:
    model = adapted(base("llama-untied"), fill_random, {name: IDS})
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(load_decoder(tmp_path / "llama-untied"), tmp_path / "adapter")
    assert torch.equal(ours(loaded), ours(model))


@pytest.mark.parametrize(
    "indices",
    [{"lm_head": [7, 3]}, {"embed_tokens": [7, 3], "lm_head": [5]}, {"embed_tokens": [7, 3]}],
    ids=["the head's alone", "others", "the embedding's"],
)
def test_a_tied_head_with_rows_of_its_own_comes_back_as_in_peft(
    indices: dict[str, list[int]],
    base: Callable[[str], Path],
    tiny_model: Build,
    fill_random: Fill,
    peft: Any,
    tmp_path: Path,
) -> None:
    tokens, folder = TOKENS.clamp(max=VOCAB - 1), base("llama-tied")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], trainable_token_indices=indices
    )
    by_peft = peft.get_peft_model(tiny_model("llama-tied"), config)
    fill_random(by_peft, 6, only_trainable=True, std=0.3).eval()
    by_peft.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    with torch.no_grad():
        wanted = by_peft(tokens).logits
        model = load_adapter(load_decoder(folder), tmp_path / "peft").eval()
        assert (model(tokens) - wanted).abs().max() <= 1e-5
        save_adapter(model, tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(tiny_model("llama-tied"), tmp_path / "ours")
        assert (again(tokens).logits - wanted).abs().max() <= 1e-5
        assert merge_lora(model, tokens).untied_head == ("lm_head" in indices)
        assert (model(tokens) - wanted).abs().max() <= 1e-5


def test_an_error_while_lora_is_applied_leaves_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_decoder(folder.parent / "llama-tied")
    before = [(n, id(m)) for n, m in model.named_modules()]
    values = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}

    def fail(*_: object) -> None:
        raise TargetError("no tokens today")

    monkeypatch.setattr(save_load, "train_token_rows", fail)
    with pytest.raises(AdapterError, match="no tokens today"):
        load_adapter(model, folder)
    assert [(n, id(m)) for n, m in model.named_modules()] == before
    assert all(
        torch.equal(p, values[n][0]) and p.requires_grad == values[n][1]
        for n, p in model.named_parameters()
    )
    assert model.config.vocab_size == VOCAB
    assert "applied_lora" not in vars(model)


def test_other_tokens_than_the_models_are_refused(folder: Path, fill_random: Fill) -> None:
    model = adapted(folder.parent / "llama-tied", fill_random, [3])
    with pytest.raises(
        AdapterError, match=r"trainable tokens of lm_head: \[7, 64, 65\] in the file"
    ):
        load_adapter(model, folder)
    assert applied_lora(model).trainable_tokens["lm_head"].ids == (3,)
