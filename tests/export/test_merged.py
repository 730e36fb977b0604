"""Merged models: in the base's dtype, with everything that the base's directory had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

from lora.adapters.apply import apply_lora, lora_layers
from lora.adapters.save_load import load_adapter, save_adapter
from lora.cli import main
from lora.config import LoRAConfig
from lora.data.tokenizers.subword import TextTokenizer, load_tokenizer
from lora.decoder.decoder import build_decoder
from lora.decoder.families import decoder_config
from lora.pretrained.hf_weights import load_decoder, save_decoder
from tests.integration.conftest import TEMPLATE, make_tokenizer

NAMED = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "{{ 'x' }}"}]
GENERATION = {"eos_token_id": [2], "temperature": 0.6, "top_p": 0.9, "do_sample": True}
NORM = "model.norm.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A bf16 model with one fp32 norm and settings that a tokenizer of ours would not write."""
    folder, tokenizer = tmp_path / "base", make_tokenizer()
    config = {
        "model_type": "llama",
        "vocab_size": tokenizer.vocab_size + 6,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    save_decoder(build_decoder(decoder_config(config), seed=1, dtype=torch.bfloat16), folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {NORM: tensors[NORM].float()}, folder / "model.safetensors")
    tokenizer.save(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {
        "chat_template": NAMED,
        "padding_side": "left",
        "model_max_length": 8192,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ 'rag' }}")
    (folder / "LICENSE").write_text("free")
    return folder


def make_adapter(base: Path, tokenizer: TextTokenizer | None = None) -> Path:
    model = apply_lora(load_decoder(base), LoRAConfig(rank=2, init_seed=0))
    generator = torch.Generator().manual_seed(3)
    for layer in lora_layers(model).values():
        with torch.no_grad():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.2)
    folder = base.with_name("adapter")
    save_adapter(model, folder)
    if tokenizer is not None:
        tokenizer.save(folder)
    return folder


def merge(base: Path, adapter: Path, *more: str) -> Path:
    out = base.with_name("merged")
    assert main(["merge", str(adapter), str(out), "--model", str(base), *more]) == 0
    return out


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def test_everything_that_the_base_had_is_kept(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(base, load_tokenizer(base))
    out = merge(base, adapter)
    assert "(bfloat16, float32); logits differ by" in capsys.readouterr().out
    kept = [path for path in base.rglob("*") if path.is_file() and path.name != "config.json"]
    for path in kept:
        if path.suffix != ".safetensors":
            assert (out / path.relative_to(base)).read_bytes() == path.read_bytes(), path
    tensors, former = (load_file(f / "model.safetensors") for f in (out, base))
    assert {n: t.dtype for n, t in tensors.items()} == {n: t.dtype for n, t in former.items()}
    assert read(out, "config.json")["torch_dtype"] == "bfloat16"
    assert [p.name for p in base.parent.glob(".*")] == []


def test_the_merged_values_are_rounded_once(base: Path) -> None:
    adapter = make_adapter(base)
    model = load_adapter(load_decoder(base), adapter)
    out = merge(base, adapter)
    name = "model.layers.1.mlp.up_proj"
    exact = lora_layers(model)[name].merge().weight
    assert isinstance(exact, torch.Tensor)
    written = load_file(out / "model.safetensors")[f"{name}.weight"]
    assert torch.equal(written, exact.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_dtype_that_is_asked_for_is_written(base: Path, dtype: str) -> None:
    out = merge(base, make_adapter(base), "--dtype", dtype)
    kinds = {tensor.dtype for tensor in load_file(out / "model.safetensors").values()}
    assert kinds == {getattr(torch, dtype)}
    assert read(out, "config.json")["torch_dtype"] == dtype


def test_what_training_changed_takes_its_place_among_the_base_s_settings(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    tokenizer.backend.add_special_tokens([AddedToken("<|call|>", special=True)])
    learned = "{{ messages[0]['content'] + '<|eot_id|>' }}"
    changed = TextTokenizer(
        tokenizer.backend, "<|im_start|>", "<|im_end|>", "<|endoftext|>", learned, (2, 0)
    )
    out = merge(base, make_adapter(base, changed))
    settings = read(out, "tokenizer_config.json")
    assert settings["chat_template"] == [{"name": "default", "template": learned}, NAMED[1]]
    assert settings["pad_token"] == "<|endoftext|>"
    assert settings["padding_side"] == "left"
    assert settings["model_max_length"] == 8192
    assert load_tokenizer(out).encode("<|call|>") == tokenizer.ids_of(["<|call|>"])
    assert read(out, "generation_config.json") == {
        **GENERATION,
        "eos_token_id": [2, 0],
        "bos_token_id": 1,
        "pad_token_id": 0,
    }


def test_a_merged_model_is_replaced_only_when_told_and_nothing_else_is(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(base)
    out = merge(base, adapter)
    words = ["merge", str(adapter), str(out), "--model", str(base)]
    assert main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    (out / "notes.md").write_text("mine")
    assert main([*words, "--overwrite"]) == 2
    assert "it holds notes.md" in capsys.readouterr().err
    assert main(["merge", str(adapter), str(base), "--model", str(base), "--overwrite"]) == 2
    assert "is read by this command" in capsys.readouterr().err
