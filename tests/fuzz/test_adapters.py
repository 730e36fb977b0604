"""Untrusted adapter folders: refused with a message, and the model is unchanged."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load

from lora.adapters import patterns
from lora.adapters.apply import apply_lora, lora_layers
from lora.adapters.save_load import load_adapter, read_adapter_config, save_adapter
from lora.config import LoRAConfig
from lora.decoder.decoder import Decoder, build_decoder
from lora.decoder.families import decoder_config
from lora.errors import AdapterError, LoraError
from lora.export.vllm import check_adapter_for_vllm

SIZES: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
}
FIELDS = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "use_rslora"),
    *("bias", "peft_type", "trainable_token_indices", "init_lora_weights", "use_dora"),
    *("base_model_name_or_path", "target_parameters"),
)


def fresh() -> Decoder:
    return build_decoder(decoder_config(SIZES), seed=1)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with random values in A and B."""
    model = apply_lora(fresh(), LoRAConfig(rank=2, targets=("q_proj", "down_proj"), init_seed=0))
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(generator=torch.Generator().manual_seed(1))
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model, folder)
    return folder


@pytest.fixture
def try_folder(tmp_path: Path, valid: Path) -> Callable[..., None]:
    """Return a function that loads an adapter of which one file is replaced."""
    expected = {name: value.clone() for name, value in fresh().state_dict().items()}
    model = fresh()
    names = ("adapter_config.json", "adapter_model.safetensors")

    def attempt(**replaced: bytes) -> None:
        for name in names:
            own = replaced.get(name.split(".")[0])
            (tmp_path / name).write_bytes((valid / name).read_bytes() if own is None else own)
        nonlocal model
        for look in (read_adapter_config, check_adapter_for_vllm):
            with contextlib.suppress(LoraError):
                look(tmp_path)
        try:
            load_adapter(model, tmp_path)
        except LoraError:
            now = model.state_dict()
            assert now.keys() == expected.keys()
            assert all(torch.equal(now[name], expected[name]) for name in expected)
            raise
        values = [v for layer in lora_layers(model).values() for v in (layer.lora_A, layer.lora_B)]
        assert all(torch.isfinite(value).all() for value in values)
        model = fresh()  # it is wrapped now

    return attempt


def test_the_adapter_itself_loads(try_folder: Callable[..., None]) -> None:
    try_folder()


def test_damaged_tensors_are_never_loaded(
    fuzz: Any, make: dict[str, Any], valid: Path, try_folder: Callable[..., None]
) -> None:
    data = (valid / "adapter_model.safetensors").read_bytes()

    def check(damaged: bytes) -> None:
        try_folder(adapter_model=damaged)
        if b"lora_lm_tensors_sha256" in damaged:  # else nothing says what was saved
            assert load(damaged).keys() == load(data).keys()
            assert all(torch.equal(v, load(data)[k]) for k, v in load(damaged).items())

    fuzz(make["bytes"](data), check)


def test_headers_that_lie(
    fuzz: Any, make: dict[str, Any], valid: Path, try_folder: Callable[..., None]
) -> None:
    data = (valid / "adapter_model.safetensors").read_bytes()
    fuzz(make["header"](data), lambda damaged: try_folder(adapter_model=damaged))


def test_any_settings(
    fuzz: Any, make: dict[str, Any], valid: Path, try_folder: Callable[..., None]
) -> None:
    described = json.loads((valid / "adapter_config.json").read_text())
    described = {name: described.get(name) for name in {*FIELDS, *described}}
    objects = make["object"](described)
    fuzz(objects, lambda value: try_folder(adapter_config=json.dumps(value).encode()))


def test_any_json_as_settings(
    fuzz: Any, make: dict[str, Any], try_folder: Callable[..., None]
) -> None:
    values = make["json"]().map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40)
    fuzz(values, lambda value: try_folder(adapter_config=value))


@pytest.mark.parametrize(
    "pattern", [r"(.+)+[!?]", r"(.*)*[!?]", r"(\w+\.?)+[!?]", r"((a|.)+b?)*[!?]"]
)
def test_a_pattern_never_takes_for_ever(
    pattern: str, valid: Path, try_folder: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "MAX_MATCHING_S", 0.05)
    described = json.loads((valid / "adapter_config.json").read_text())
    for field, value in (
        ("target_modules", pattern),
        ("exclude_modules", pattern),
        ("rank_pattern", {pattern: 2}),
        ("modules_to_save", [pattern]),
    ):
        text = json.dumps({**described, field: value}).encode()
        with contextlib.suppress(AdapterError):  # slow ones are refused, others match nothing
            try_folder(adapter_config=text)


@pytest.mark.parametrize("name", ["../../x", "/x", "..\\x", "a/../../x"])
def test_names_in_an_adapter_never_become_paths(
    name: str, valid: Path, try_folder: Callable[..., None], tmp_path: Path
) -> None:
    """The base's name only appears in messages; modules are looked up, never opened as files."""
    outside = tmp_path.parent / "x"
    outside.mkdir(exist_ok=True)
    before = sorted(tmp_path.parent.rglob("*"))
    described = json.loads((valid / "adapter_config.json").read_text())
    try_folder(adapter_config=json.dumps({**described, "base_model_name_or_path": name}).encode())
    with pytest.raises(AdapterError, match="modules_to_save"):
        try_folder(adapter_config=json.dumps({**described, "modules_to_save": [name]}).encode())
    new = set(tmp_path.parent.rglob("*")) - set(before)
    assert all(path.is_relative_to(tmp_path) for path in new)
