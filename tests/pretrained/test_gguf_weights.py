"""A GGUF file as a Hugging Face folder: the same logits, the same values, or one error."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers

from lora.data.tokenizers import tokenizer_trial
from lora.data.tokenizers.subword import load_tokenizer
from lora.errors import ModelError
from lora.pretrained import gguf_weights
from lora.pretrained.gguf_weights import convert_gguf, permute, unpermute
from lora.pretrained.hf_weights import load_decoder
from lora.runs.disk import CACHE_VARIABLE

TOKENS = ["<s>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
VOCAB = len(TOKENS)
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "rms_norm_eps": 1e-5,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
_OLMO3_ROPES = {
    kind: {"rope_type": "default", "rope_theta": 10_000.0}
    for kind in ("full_attention", "sliding_attention")
}
_LONGROPE = {"short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [2.0, 3.3, 4.0, 7.7]}
_GEMMA_KINDS = ["sliding_attention", "full_attention"]

# name -> architecture, transformers' classes, what differs, what the file says of it
CASES: dict[str, tuple[str, str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", "LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True}, {}),
    "llama-biases": (
        "llama",
        "LlamaConfig",
        "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_theta": 500.0}},
        {"rope.freq_base": 500.0},
    ),
    "llama-linear": (
        "llama",
        "LlamaConfig",
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "llama3": ("llama", "LlamaConfig", "LlamaForCausalLM", {"rope_parameters": _LLAMA3}, {}),
    "qwen2": ("qwen2", "Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}, {}),
    "qwen2-yarn": (
        "qwen2",
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 10_000.0,
            }
        },
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
        },
    ),
    "qwen3": ("qwen3", "Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32}, {}),
    "gemma3": (
        "gemma3",
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "sliding_window": 6,
            "query_pre_attn_scalar": 16,
            "layer_types": _GEMMA_KINDS,
            "rope_parameters": _GEMMA_ROPES,
        },
        {
            "attention.sliding_window": 6,
            "attention.sliding_window_pattern": 2,
            "rope.freq_base": 5000.0,
            "rope.freq_base_swa": 50.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "gemma2": (
        "gemma2",
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "sliding_window": 6,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
        {
            "attention.sliding_window": 6,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "smollm3": (
        "smollm3",
        "SmolLM3Config",
        "SmolLM3ForCausalLM",
        {"num_hidden_layers": 4, "rope_parameters": {"rope_theta": 500.0}},
        {"rope.freq_base": 500.0},
    ),
    "phi3": (
        "phi3",
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            "original_max_position_embeddings": 16,
            "partial_rotary_factor": 0.5,
            "rope_parameters": {"rope_type": "longrope", **_LONGROPE},
        },
        {
            "rope.dimension_count": 8,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.attn_factor": math.sqrt(1.5),
            "attention.sliding_window": 0,
        },
    ),
    "granite": (
        "granite",
        "GraniteConfig",
        "GraniteForCausalLM",
        {
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.4,
            "logits_scaling": 5.0,
        },
        {
            "embedding_scale": 6.0,
            "residual_scale": 0.3,
            "attention.scale": 0.4,
            "logit_scale": 5.0,
        },
    ),
    "olmo2": ("olmo2", "Olmo2Config", "Olmo2ForCausalLM", {}, {}),
    "olmo3": (
        "olmo2",
        "Olmo3Config",
        "Olmo3ForCausalLM",
        {"sliding_window": 6, "layer_types": _GEMMA_KINDS, "rope_parameters": _OLMO3_ROPES},
        {"attention.sliding_window": 6, "attention.sliding_window_pattern": [True, False]},
    ),
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
MakeFile = Callable[..., tuple[Any, Path]]


PHI3_NAMES = NAMES | {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
OTHER_NAMES = {
    "gemma2": GEMMA_NAMES,
    "gemma3": GEMMA_NAMES,
    "olmo2": GEMMA_NAMES,
    "phi3": PHI3_NAMES,
}


def gguf_name(name: str, architecture: str) -> str:
    names = OTHER_NAMES.get(architecture, NAMES)
    stem, _, ending = name.rpartition(".")
    if stem in names:
        return f"{names[stem]}.{ending}"
    _, _, number, inside = stem.split(".", 3)
    return f"blk.{number}.{names[inside]}.{ending}"


def llama_cpp_order(value: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: even rows of a head come from its first half, odd ones from its second."""
    width = value.shape[0] // heads
    order = [
        head * width + half * (width // 2) + place
        for head in range(heads)
        for place in range(width // 2)
        for half in range(2)
    ]
    return value[order]


def file_values(model: Any, architecture: str) -> dict[str, np.ndarray]:
    """Return the tensors of a transformers `model` as llama.cpp's converter would write them."""
    config, values = model.config, {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        if architecture in ("llama", "smollm3", "granite") and ".q_proj." in name:
            value = llama_cpp_order(value, config.num_attention_heads)
        if architecture in ("llama", "smollm3", "granite") and ".k_proj." in name:
            value = llama_cpp_order(value, config.num_key_value_heads)
        if architecture in ("gemma2", "gemma3") and "norm" in name:
            value = value + 1
        values[gguf_name(name, architecture)] = value
    return values


def llama3_factors(config: Any) -> np.ndarray:
    wavelengths = 2 * np.pi * 10_000.0 ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    factors = []
    for wavelength in wavelengths:
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    return np.array(factors, dtype=np.float32)


def add_settings(
    writer: gguf.GGUFWriter, architecture: str, config: Any, more: dict[str, Any]
) -> None:
    settings = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": 10_000.0,
    }
    for key, value in {**settings, **more}.items():
        add_value(writer, f"{architecture}.{key}", value)


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, list: writer.add_array}
    add[type(value)](key, value)


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    writer.add_array("tokenizer.ggml.tokens", TOKENS)
    writer.add_array("tokenizer.ggml.token_type", [3, 3] + [1] * (VOCAB - 2))
    writer.add_array("tokenizer.ggml.merges", ["t h"])
    writer.add_uint32("tokenizer.ggml.bos_token_id", 0)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 1)
    writer.add_string("tokenizer.chat_template", "{{ messages }}<|im_end|>")


def build_model(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    _, config_class, model_class, differences, _ = CASES[name]
    config = getattr(transformers, config_class)(**{**SIZES, **differences})
    model = getattr(transformers, model_class)(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 0.5 if parameter.dim() == 1 else 0.0
            parameter.normal_(centre, 0.3, generator=generator)
    return model


@pytest.fixture
def make_file(tmp_path: Path) -> MakeFile:
    """Return a function: case, type of the matrices, other settings -> model, GGUF file."""

    def make(
        name: str, kind: Kind = Kind.F32, change: Callable[[dict[str, Any]], None] | None = None
    ) -> tuple[Any, Path]:
        model = build_model(name)
        architecture, _, _, _, settings = CASES[name]
        values: dict[str, Any] = file_values(model, architecture)
        if name == "llama3":
            values["rope_freqs.weight"] = llama3_factors(model.config)
        if name == "phi3":
            for kind_of, factors in _LONGROPE.items():
                which = kind_of.removesuffix("_factor")
                values[f"rope_factors_{which}.weight"] = np.array(factors, np.float32)
        values |= {f"setting {key}": value for key, value in settings.items()}
        if change is not None:
            change(values)
        path = tmp_path / f"{name}.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        more = {k.removeprefix("setting "): v for k, v in values.items() if k.startswith("setting")}
        add_settings(writer, architecture, model.config, more)
        add_tokenizer(writer)
        for tensor, value in values.items():
            if tensor.startswith("setting "):
                continue
            own = kind if value.ndim == 2 else Kind.F32
            writer.add_tensor(tensor, quantize(value.astype(np.float32), own), raw_dtype=own)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return model, path

    return make


def some_ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", list(CASES))
def test_the_converted_model_gives_the_same_logits(
    name: str, make_file: MakeFile, tmp_path: Path
) -> None:
    import transformers

    model, path = make_file(name)
    folder = tmp_path / "folder"
    folder.mkdir()
    convert_gguf(path, folder)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(again) is type(model)
    ids = some_ids()
    with torch.no_grad():
        wanted, ours = model(ids).logits, load_decoder(folder)(ids)
        torch.testing.assert_close(again(ids).logits, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen2", "qwen3"])
def test_fp32_values_come_back_to_the_bit(name: str, make_file: MakeFile, tmp_path: Path) -> None:
    model, path = make_file(name)
    convert_gguf(path, tmp_path)
    values = load_file(tmp_path / "model.safetensors")
    wanted = dict(model.named_parameters())
    assert values.keys() == wanted.keys()
    for key, value in values.items():
        assert value.tobytes() == wanted[key].detach().numpy().tobytes(), key


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_1])
def test_quantised_values_are_the_dequantised_ones(
    kind: Kind, make_file: MakeFile, tmp_path: Path
) -> None:
    model, path = make_file("llama", kind)
    convert_gguf(path, tmp_path)
    values = load_file(tmp_path / "model.safetensors")
    for name, stored in file_values(model, "llama").items():
        if stored.ndim != 2:
            continue
        wanted = dequantize(quantize(stored, kind), kind)
        key = next(key for key in values if gguf_name(key, "llama") == name)
        seen = values[key]
        heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-2])
        if heads:
            seen = llama_cpp_order(seen, heads)
        np.testing.assert_array_equal(seen, wanted, err_msg=name)


def test_the_folder_is_a_complete_model_folder(make_file: MakeFile, tmp_path: Path) -> None:
    _, path = make_file("llama")
    shares: list[float] = []
    convert_gguf(path, tmp_path, shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5  # as meant, not as fp32 has it
    assert config["rope_theta"] == 10_000.0
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode(tokenizer.encode("the thing 12")) == "the thing 12"
    assert tokenizer.stop_ids == (1,)


@pytest.mark.parametrize("shape", [(8, 3), (8,)])
def test_llamas_row_order_is_converted_back(shape: tuple[int, ...]) -> None:
    value = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    np.testing.assert_array_equal(permute(value, 2), llama_cpp_order(value, 2))
    np.testing.assert_array_equal(unpermute(llama_cpp_order(value, 2), 2), value)


def test_the_27b_gemma_scales_by_the_width_per_head(make_file: MakeFile) -> None:
    from lora.pretrained.gguf_config import gguf_config
    from lora.pretrained.gguf_file import GGUFFile

    _, path = make_file("gemma3")
    file = GGUFFile(path)
    assert gguf_config(file)["query_pre_attn_scalar"] == 16
    file.metadata["gemma3.block_count"] = 62
    file.tensors |= {f"spare{n}": file.tensors["token_embd.weight"] for n in range(62)}
    file.metadata["gemma3.attention.head_count"] = 2
    assert gguf_config(file)["query_pre_attn_scalar"] == 32


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.update({key: value})


def _drop(key: str) -> Callable[[dict[str, Any]], None]:
    def drop(values: dict[str, Any]) -> None:
        del values[key]

    return drop


FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], None], list[str]]] = {
    "missing tensor": (
        "llama",
        _drop("blk.1.ffn_up.weight"),
        ["model.layers.1.mlp.up_proj.weight (96, 64) is missing"],
    ),
    "odd tensor": (
        "llama",
        _set("blk.0.ffn_gate_inp.weight", np.zeros((4, 64), np.float32)),
        ["blk.0.ffn_gate_inp.weight is not a tensor of this architecture"],
    ),
    "misshapen": (
        "llama",
        _set("blk.0.attn_k.weight", np.zeros((16, 64), np.float32)),
        ["blk.0.attn_k.weight is (16, 64)", "imply (32, 64)"],
    ),
    "one bias of four": (
        "llama",
        _set("blk.0.attn_q.bias", np.zeros(64, np.float32)),
        ["blk.0.attn_q.bias is not a tensor"],
    ),
    "no embedding": ("llama", _drop("token_embd.weight"), ["token_embd.weight is missing"]),
    "embedding too small": (
        "llama",
        _set("token_embd.weight", np.zeros((VOCAB - 1, 64), np.float32)),
        [f"{VOCAB} tokens", f"{VOCAB - 1} rows"],
    ),
    "experts": ("llama", _set("setting expert_count", 8), ["expert_count=8: not supported"]),
    "soft caps": (
        "gemma3",
        _set("setting final_logit_softcapping", 30.0),
        ["final_logit_softcapping=30.0"],
    ),
    "longrope in halves": ("phi3", _drop("rope_factors_long.weight"), ["long.weight is missing"]),
    "longrope, other width": (
        "phi3",
        _set("setting rope.dimension_count", 12),
        ["short_factor has 4 values: 6"],
    ),
    "two thetas": ("gemma2", _set("setting rope.freq_base_swa", 5.0), ["freq_base_swa=5.0"]),
    "no logit scale": ("granite", _set("setting logit_scale", None), ["logit_scale is missing"]),
    "part of the head turns": (
        "llama",
        _set("setting rope.dimension_count", 8),
        ["rope.dimension_count=8: not supported, only 16"],
    ),
    "a window": ("qwen2", _set("setting attention.sliding_window", 32), ["sliding_window=32"]),
    "longrope": ("llama", _set("setting rope.scaling.type", "longrope"), ["'longrope'", "yarn"]),
    "no factor": ("llama", _set("setting rope.scaling.type", "linear"), ["factor is missing"]),
    "other factors": (
        "llama3",
        _set("rope_freqs.weight", np.linspace(1, 8, 8).astype(np.float32)),
        ["rope_freqs.weight are not those of Llama 3.1"],
    ),
    "heads by layer": (
        "llama",
        _set("setting attention.head_count", [4, 4]),
        ["head_count=[4, 4]: allowed: an int"],
    ),
    "huge": (
        "llama",
        _set("setting feed_forward_length", 2**31),
        ["feed_forward_length=2147483648: allowed: at most 16,777,216"],
    ),
    "many blocks": (
        "llama",
        _set("setting block_count", 2**20),
        ["block_count=1048576: allowed: at most the 2"],
    ),
    "no width": ("llama", _set("setting embedding_length", None), ["embedding_length is missing"]),
    "not finite": (
        "llama",
        _set("output_norm.weight", np.full(64, np.nan, np.float32)),
        ["output_norm.weight is not finite", "Copy it again"],
    ),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_unsupported_files_are_refused(fault: str, make_file: MakeFile, tmp_path: Path) -> None:
    name, change, words = FAULTS[fault]
    _, path = make_file(name, change=change)
    with pytest.raises(ModelError) as caught:
        convert_gguf(path, tmp_path)
    message = str(caught.value)
    assert str(path) in message
    assert all(word in message for word in words), message


def test_all_faults_are_named_at_once(make_file: MakeFile, tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["setting expert_count"] = 4
        values["setting rope.scaling.type"] = "longrope"
        values["setting context_length"] = 0

    _, path = make_file("llama", change=change)
    with pytest.raises(ModelError) as caught:
        convert_gguf(path, tmp_path)
    for word in ("expert_count", "longrope", "context_length=0"):
        assert word in str(caught.value)
    assert not (tmp_path / "config.json").exists()


def test_an_unknown_architecture_and_its_nearest(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "qwen22")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError) as caught:
        convert_gguf(path, tmp_path)
    for word in ("'qwen22'", "llama, qwen2, qwen3, smollm3", "Did you mean 'qwen2'?", "--impl"):
        assert word in str(caught.value)


def test_an_unknown_tokenizer_is_an_error_of_the_file(make_file: MakeFile, tmp_path: Path) -> None:
    _, path = make_file("llama")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"smollm", b"smo11m"))
    with pytest.raises(
        ModelError, match=r"Cannot use the tokenizer in .*'smo11m'.*Did you mean 'smollm'"
    ):
        convert_gguf(path, tmp_path)


class OpenFile(NamedTuple):
    """What the tokenizer is built from."""

    path: Path
    metadata: dict[str, Any]


def test_vocabularies_that_the_library_cannot_take_are_errors_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    metadata = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": ["a:b", *TOKENS[1:]],
        "merges": ["t h"],
        "bos_token_id": 0,
        "add_bos_token": True,
    }
    file = OpenFile(tmp_path / "x.gguf", {f"tokenizer.ggml.{k}": v for k, v in metadata.items()})
    with pytest.raises(ModelError, match=r"tokenizer in .*x\.gguf: Cannot build Piece"):
        gguf_weights._build_tokenizer(file, VOCAB)  # type: ignore[arg-type]
    # Every way to cut a token is tried: of a long one in a time that grows with its square.
    shorter = "import lora.data.tokenizers.tokenizer_trial as t; t.MAX_TRIAL_S = 1; from"
    monkeypatch.setattr(tokenizer_trial, "_START", tokenizer_trial._START.replace("from", shorter))
    metadata |= {"model": "llama", "tokens": ["<s>", "t" * 10**6], "scores": [0.0, 0.0]}
    file = OpenFile(tmp_path / "x.gguf", {f"tokenizer.ggml.{k}": v for k, v in metadata.items()})
    with pytest.raises(ModelError, match=r"x\.gguf: loading and trying it takes more than"):
        gguf_weights._build_tokenizer(file, VOCAB)  # type: ignore[arg-type]


def test_a_full_disk_is_foreseen(
    make_file: MakeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    _, path = make_file("llama")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ModelError, match=r"GB in fp32.*0\.0 GB free.*LORALM_CACHE"):
        convert_gguf(path, tmp_path)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_flipped_bits_give_a_model_or_one_error(
    name: str, make_file: MakeFile, tmp_path: Path
) -> None:
    _, path = make_file(name)
    whole = path.read_bytes()
    first = b"blk.0.attn_qkv.weight" if name == "phi3" else b"blk.0.attn_q.weight"
    header_bytes = whole.index(first)  # all settings, and some of the tensors
    draw = random.Random(0)
    messages = []
    for trial in range(100):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 3))):
            damaged[draw.randrange(24, header_bytes)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        folder = tmp_path / str(trial)
        folder.mkdir()
        try:
            convert_gguf(path, folder)
        except ModelError as error:
            messages.append(str(error))
    assert 20 < len(messages) < 100
    assert all(str(path) in message for message in messages)
