"""GGUF export: our reader and transformers' read the same model back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lora.adapters.apply import apply_lora, lora_layers
from lora.adapters.merge import merge_lora
from lora.config import LoRAConfig
from lora.data.tokenizers.subword import TextTokenizer, load_tokenizer
from lora.errors import ConfigError, DataError, ModelError
from lora.export.gguf import (
    LOGITS_TOLERANCES,
    TOLERANCES,
    export_gguf,
    relative_error,
)
from lora.pretrained.gguf_file import GGUFFile
from lora.pretrained.gguf_weights import convert_gguf
from lora.pretrained.hf_weights import load_decoder, map_decoder

VOCAB = 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
_GEMMA = {
    "num_hidden_layers": 6,
    "sliding_window": 6,
    "query_pre_attn_scalar": 16,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-biases": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True},
    ),
    "llama3": ("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": _LLAMA3}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2Config", "Qwen2ForCausalLM", {"rope_parameters": _YARN}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "sliding_window": 6,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.5,
            "final_logit_softcapping": 4.0,
        },
    ),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"num_hidden_layers": 5}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"sliding_window": 64}),
    "phi3-longrope": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 20,
            "partial_rotary_factor": 0.75,
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.1, 1.3, 1.7, 2.0, 2.0, 2.1],
                "long_factor": [2.0, 4.0, 6.5, 8.0, 8.0, 9.3],
            },
        },
    ),
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        {
            "attention_bias": True,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.0781,
            "residual_multiplier": 0.22,
            "logits_scaling": 7.0,
        },
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "olmo3": ("Olmo3Config", "Olmo3ForCausalLM", {"num_hidden_layers": 4, "sliding_window": 7}),
    "olmo3-windows": ("Olmo3Config", "Olmo3ForCausalLM", {"sliding_window": 7}),
}
OFFSET = ("gemma2", "gemma3")
"""Their norms go through 1 + w in fp32."""
MakeFolder = Callable[..., Path]


def build_tokenizer() -> TextTokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 10,  # as in real models, some rows of the embedding have no token
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
    )
    backend.train_from_iterator(["the cat and the hat"] * 9, trainer)
    return TextTokenizer(backend, bos_token="<s>", eos_token="</s>", stop_ids=(2,))


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Return a function: case, overrides -> folder with a random model and a tokenizer."""
    transformers = pytest.importorskip("transformers")

    def make(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
        config_class, model_class, differences = CASES[name]
        config = getattr(transformers, config_class)(**{**SIZES, **differences, **overrides})
        model = getattr(transformers, model_class)(config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                centre = 0.5 if parameter.dim() == 1 else 0.0
                parameter.normal_(centre, 0.2, generator=generator)
        folder = tmp_path / name
        model.to(dtype).save_pretrained(folder)
        build_tokenizer().save(folder)
        return folder

    return make


def read_back(path: Path) -> Path:
    folder = path.with_name(f"{path.stem}-again")
    folder.mkdir()
    convert_gguf(path, folder)
    return folder


def logits_of(folder: Path) -> torch.Tensor:
    ids = torch.randint(0, VOCAB, (2, 30), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits: torch.Tensor = load_decoder(folder)(ids)
    return logits


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


@pytest.mark.parametrize("name", list(CASES))
def test_f32_gives_the_same_model_back(name: str, make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder(name)
    report = export_gguf(folder, tmp_path / "out.gguf", "f32")
    assert report.worst[1] == 0.0
    assert report.logits_error <= (1e-5 if name in OFFSET else 0.0)
    assert report.size_bytes == (tmp_path / "out.gguf").stat().st_size
    again = read_back(report.path)
    if name in OFFSET:
        torch.testing.assert_close(logits_of(again), logits_of(folder), rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(logits_of(again), logits_of(folder))
    ours, theirs = load_tokenizer(folder), load_tokenizer(again)
    for text in ("the cat, and naïve 日本 🙂\n\n 123", "a</s>b"):
        assert theirs.encode(text) == ours.encode(text)
    assert (theirs.eos_id, theirs.bos_id, theirs.pad_id) == (ours.eos_id, ours.bos_id, None)
    assert theirs.vocab_size == ours.vocab_size


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "gemma2"])
def test_transformers_reads_the_file_as_the_same_model(
    name: str, make_folder: MakeFolder, tmp_path: Path
) -> None:
    import transformers

    # Of these it takes its defaults, whatever the file says.
    defaults: dict[str, dict[str, Any]] = {
        "qwen3": {"head_dim": 128},
        "gemma3": {"head_dim": 256, "query_pre_attn_scalar": 256, "rope_parameters": None},
        "gemma2": {
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
        },
    }
    folder = make_folder(name, **defaults.get(name, {}))
    export_gguf(folder, tmp_path / "out.gguf", "f32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf")
    ids = torch.randint(0, VOCAB, (2, 30), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        seen = model.eval()(ids).logits
    torch.testing.assert_close(seen, logits_of(folder), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "least"), [("f16", 1e-5), ("q8_0", 1e-3)])
def test_rounding_is_measured_and_bounded(
    dtype: Any, least: float, make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = make_folder("llama-biases")
    report = export_gguf(folder, tmp_path / "out.gguf", dtype)
    again = load_decoder(read_back(report.path)).state_dict()
    for name, value in load_decoder(folder).named_parameters():
        error = relative(again[name], value.detach())
        assert report.errors[name] == pytest.approx(error, abs=1e-7)
        if value.dim() == 1:
            assert error == 0.0  # norms and biases stay in fp32
    assert least < report.worst[1] < TOLERANCES[dtype]


def test_q8_0_keeps_rows_that_do_not_divide_in_f16(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder("llama", intermediate_size=80)
    export_gguf(folder, tmp_path / "out.gguf", "q8_0")
    file = GGUFFile(tmp_path / "out.gguf")
    assert file.tensors["blk.0.ffn_down.weight"].kind == 1
    assert file.tensors["blk.0.ffn_up.weight"].kind == 8
    assert file.tensors["blk.0.attn_norm.weight"].kind == 0


def test_a_bf16_folder_loses_nothing_in_f16(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder("llama", torch.bfloat16)
    report = export_gguf(folder, tmp_path / "out.gguf", "f16")
    # bf16 has fewer digits than fp16; only the very smallest values lose some.
    assert report.worst[1] < 1e-6
    assert GGUFFile(report.path).metadata["general.name"] == "llama"


def test_a_decoder_needs_its_tokenizer(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder("llama")
    model = load_decoder(folder)
    with pytest.raises(ConfigError, match="pass tokenizer="):
        export_gguf(model, tmp_path / "out.gguf")
    export_gguf(model, tmp_path / "one.gguf", tokenizer=build_tokenizer(), name="mine")
    export_gguf(folder, tmp_path / "two.gguf", name="mine")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


@pytest.mark.parametrize("is_mapped", [True, False])
def test_lora_inside_the_blocks_is_merged_into_the_file(
    make_folder: MakeFolder, tmp_path: Path, is_mapped: bool
) -> None:
    folder, tokenizer = make_folder("llama", torch.bfloat16), build_tokenizer()
    plain = load_decoder(folder)
    mapped = map_decoder(folder)
    for model in (plain, mapped.model):
        apply_lora(model, LoRAConfig(rank=2, init_seed=0))
        for layer in lora_layers(model).values():
            with torch.no_grad():
                layer.lora_B.fill_(0.05)
    if is_mapped:
        export_gguf(mapped, tmp_path / "one.gguf", "f32", tokenizer=tokenizer, name="x")
    else:
        export_gguf(plain, tmp_path / "one.gguf", "f32", tokenizer=tokenizer, name="x")
    merge_lora(plain)
    export_gguf(plain, tmp_path / "two.gguf", "f32", tokenizer=tokenizer, name="x")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_an_unknown_type_and_its_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'q8': allowed are f32, f16, q8_0. Did you mean 'q8_0'"):
        export_gguf(tmp_path, tmp_path / "out.gguf", "q8")  # type: ignore[arg-type]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "window": ("mistral", {"sliding_window": 8}, "have a sliding window"),
    "activation": ("llama", {"hidden_act": "gelu"}, "activation is gelu, not silu"),
    "factors": (
        "llama3",
        {"rope_parameters": {**_LLAMA3, "low_freq_factor": 2.0}},
        "not that of Llama 3.1",
    ),
    "yarn": ("qwen2", {"rope_parameters": {**_YARN, "beta_fast": 4.0}}, "other beta_fast"),
    "yarn's heat": (
        "qwen2",
        {"rope_parameters": {**_YARN, "attention_factor": 2.0}},
        "scales by 2.0",
    ),
    "scale": ("gemma3", {"query_pre_attn_scalar": 20}, "not scaled by 1 / √16"),
    "phi3's window": ("phi3", {"sliding_window": 8}, "sliding window, which llama.cpp"),
    "phi3's width": ("phi3", {"head_dim": 32}, "together have 128 dimensions, not 64"),
    "no rope": ("smollm3", {"no_rope_layer_interval": 2}, "other than every 4th"),
    "biases": ("smollm3", {"attention_bias": True}, "linears have biases"),
    "gemma2's heads": ("gemma2", {"tie_word_embeddings": False}, "head is not tied"),
    "gemma2's cap": ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping is null"),
    "gemma2's windows": (
        "gemma2",
        {"layer_types": ["full_attention", "sliding_attention"]},
        "not those of a period of 2",
    ),
    "olmo2's head": ("olmo2", {"tie_word_embeddings": True}, "head is tied"),
    "olmo3's ropes": (
        "olmo3",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e5},
            }
        },
        "another rope_theta",
    ),
    "longrope elsewhere": (
        "granite",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 16,
            }
        },
        "scaled by longrope",
    ),
    "pattern": (
        "gemma3",
        {"layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 4},
        "regular pattern",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_models_that_the_format_takes_for_other_ones(
    case: str, make_folder: MakeFolder, tmp_path: Path
) -> None:
    name, overrides, words = REFUSED[case]
    with pytest.raises(ModelError, match=words) as caught:
        export_gguf(make_folder(name, **overrides), tmp_path / "out.gguf")
    assert "Keep the model as a Hugging Face folder" in str(caught.value)
    assert not (tmp_path / "out.gguf").exists()


def test_another_family(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=16
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    build_tokenizer().save(tmp_path / "gpt2")
    with pytest.raises(ModelError, match=r"'gpt2' model.*Supported families: llama, mistral"):
        export_gguf(tmp_path / "gpt2", tmp_path / "out.gguf")


def test_more_tokens_than_the_embedding_has_rows(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder("llama", vocab_size=VOCAB - 60)
    size = build_tokenizer().vocab_size
    with pytest.raises(DataError, match=f"{size} tokens, the embedding {VOCAB - 60} rows"):
        export_gguf(folder, tmp_path / "out.gguf")


def test_values_beyond_fp16_are_refused_and_nothing_is_left(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    model = load_decoder(make_folder("llama"))
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 3] = 1e6
    out = tmp_path / "out" / "m.gguf"
    out.parent.mkdir()
    out.write_bytes(b"former")
    with pytest.raises(
        ModelError, match=r"Cannot store .*layers\.1\.mlp\.up_proj\.weight as f16: .*beyond"
    ):
        export_gguf(model, out, "f16", tokenizer=build_tokenizer(), overwrite=True)
    assert [path.name for path in out.parent.iterdir()] == ["m.gguf"]
    assert out.read_bytes() == b"former"


def test_rounding_above_the_bound_is_refused(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOLERANCES, "q8_0", 1e-4)
    with pytest.raises(ModelError, match=r"differs by 0\.00\d+, allowed is 0\.0001"):
        export_gguf(make_folder("llama"), tmp_path / "out.gguf", "q8_0")
    assert not (tmp_path / "out.gguf").exists()


def test_answers_that_differ_are_refused(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = export_gguf(make_folder("llama"), tmp_path / "near.gguf", "q8_0")
    assert 1e-4 < report.logits_error < report.logits_tolerance == 0.1
    monkeypatch.setitem(LOGITS_TOLERANCES, "q8_0", 1e-5)
    with pytest.raises(ModelError, match=r"logits differ by .*, allowed is 1e-05. Nothing was"):
        export_gguf(make_folder("llama"), tmp_path / "out.gguf", "q8_0")
    assert not (tmp_path / "out.gguf").exists()


def test_a_folder_that_is_not_there(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder("llama")
    with pytest.raises(ConfigError, match=r"Cannot write .*: there is no directory .*nowhere"):
        export_gguf(folder, tmp_path / "nowhere" / "out.gguf")


def test_what_exists_is_replaced_only_when_told_and_an_input_never(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder, out = make_folder("llama"), tmp_path / "out.gguf"
    out.write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"the file exists.*--overwrite"):
        export_gguf(folder, out)
    assert out.read_bytes() == b"mine"
    export_gguf(folder, out, overwrite=True)
    assert out.read_bytes()[:4] == b"GGUF"
    weights = (folder / "model.safetensors").read_bytes()
    for inside, given in ((folder / "model.safetensors", ()), (out, [out])):
        with pytest.raises(ConfigError, match="is read by this command"):
            export_gguf(folder, inside, overwrite=True, inputs=given)
    assert (folder / "model.safetensors").read_bytes() == weights
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama", "out.gguf"]


def test_tensors_of_zeros_have_no_error(make_folder: MakeFolder, tmp_path: Path) -> None:
    model = load_decoder(make_folder("llama-biases"))
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.q_proj.bias").zero_()
        model.get_parameter("model.layers.0.mlp.up_proj.weight").zero_()
    report = export_gguf(model, tmp_path / "out.gguf", "q8_0", tokenizer=build_tokenizer())
    assert report.errors["model.layers.0.mlp.up_proj.weight"] == 0.0


def test_relative_error_is_what_it_says() -> None:
    reference = [np.array([3.0], np.float32), np.array([4.0], np.float32)]
    assert relative_error([r * 1.5 for r in reference], reference) == pytest.approx(0.5)
    zeros = [np.zeros(1, np.float32)] * 2
    assert relative_error(reference, zeros) == pytest.approx(5.0)


def test_a_file_that_is_cut_while_it_is_read_is_an_error(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    report = export_gguf(make_folder("llama"), tmp_path / "out.gguf", "f32")
    file = GGUFFile(report.path)
    os.truncate(report.path, report.size_bytes // 2)
    with pytest.raises(ModelError, match="it became shorter while it was read"):
        list(file.blocks("output_norm.weight"))
