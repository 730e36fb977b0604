"""A GGUF file's weights and settings, as a Hugging Face folder: config.json, model.safetensors.

Values are dequantised to fp32 exactly as the `gguf` package defines them and written tensor by
tensor, so memory stays near the largest tensor. Source of names and keys: the GGUF specification
and its tables of architectures.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lora.errors import ModelError, did_you_mean

Report = Callable[[float], None]
"""Hears how much of the work is done, 0 to 1."""

ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_INSIDE_GEMMA3 = _INSIDE | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_ROPE_FACTORS = "rope_freqs.weight"
_MOST_TENSORS, _MOST_KEYS = 100_000, 10_000


class GGUFFile:
    """An open GGUF file, checked: `metadata` by key, tensors by name.

    Raises ModelError for a file that is no GGUF, is cut short, or says what cannot be.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        _check_header(path)
        try:
            reader = GGUFReader(path)
            self.metadata = {key: field.contents() for key, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OverflowError, TypeError, OSError) as error:
            raise ModelError(f"{path} is damaged: {error}. Copy it again.") from None
        self.path = path
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        size = path.stat().st_size
        for tensor in reader.tensors:
            if tensor.data_offset + int(tensor.n_bytes) > size:
                raise ModelError(f"{path} is cut short: {tensor.name} lies beyond its end.")
        self.architecture = self.metadata.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            near = did_you_mean(str(self.architecture), ARCHITECTURES)
            raise ModelError(
                f"{path}: general.architecture is {self.architecture!r}; supported are "
                f"{', '.join(ARCHITECTURES)}.{near} Use the model's Hugging Face folder, or adapt "
                "a transformers model in Python with apply_lora."
            )

    def setting(self, key: str, default: Any = None) -> Any:
        """Return the value of `key` under the architecture's name. Raises ModelError if absent."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise ModelError(
                f"{self.path} does not say {self.architecture}.{key}: use another file."
            )
        return value


def convert_gguf(file: GGUFFile, folder: Path, report: Report = lambda share: None) -> None:
    """Write `config.json` and `model.safetensors` (fp32) of `file` into `folder`."""
    config = gguf_config(file)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    names = {name: _hf_name(name, file) for name in file.tensors if name != _ROPE_FACTORS}
    shapes = {new: _shape(file.tensors[old]) for old, new in names.items()}
    values = (_values(file, old, new, config) for old, new in names.items())
    _write_fp32(folder / "model.safetensors", shapes, values, report)


def gguf_config(file: GGUFFile) -> dict[str, Any]:
    """Return `config.json`'s content for `file`."""
    architecture, model_type = ARCHITECTURES[str(file.architecture)]
    heads, width = int(file.setting("attention.head_count")), int(file.setting("embedding_length"))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{file.path} has no token_embd.weight: use another file.")
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "float32",
        "hidden_size": width,
        "intermediate_size": int(file.setting("feed_forward_length")),
        "num_hidden_layers": int(file.setting("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(file.setting("attention.head_count_kv", heads)),
        "head_dim": int(file.setting("attention.key_length", width // heads)),
        "rms_norm_eps": _rounded(file.setting("attention.layer_norm_rms_epsilon")),
        "rope_theta": _rounded(file.setting("rope.freq_base", 10_000.0)),
        "max_position_embeddings": int(file.setting("context_length")),
        "vocab_size": int(embedding.shape[1]),
        "hidden_act": "gelu_pytorch_tanh" if file.architecture == "gemma3" else "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": False,
    }
    config |= {
        key: file.metadata[f"tokenizer.ggml.{key}"]
        for key in ("bos_token_id", "eos_token_id")
        if f"tokenizer.ggml.{key}" in file.metadata
    }
    if file.architecture == "qwen2":
        del config["attention_bias"]  # Qwen2 has its bias always
    if file.architecture == "gemma3":
        config |= _gemma3_config(file, config)
    config |= _rope_scaling(file, config)
    return config


def _gemma3_config(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    pattern = ["full_attention" if n % 6 == 5 else "sliding_attention" for n in range(layers)]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": int(file.setting("attention.sliding_window")),
        "layer_types": pattern,
        "query_pre_attn_scalar": config["head_dim"],
        "rope_local_base_freq": 10_000.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }


def _rope_scaling(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """Return Llama 3's scaling if the file's factors are its, and refuse what is neither."""
    kind = file.metadata.get(f"{file.architecture}.rope.scaling.type", "none")
    factors = file.tensors.get(_ROPE_FACTORS)
    if factors is None and kind in ("none", None):
        return {}
    if factors is None and kind == "linear":
        factor = _rounded(file.setting("rope.scaling.factor"))
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    if factors is not None:
        seen = np.asarray(factors.data, dtype=np.float64).reshape(-1)
        scaling = {
            "rope_type": "llama3",
            "factor": _rounded(seen.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        wanted = _llama3_factors(config["rope_theta"], config["head_dim"], scaling)
        if seen.shape == wanted.shape and np.allclose(seen, wanted, rtol=1e-3):
            return {"rope_scaling": scaling}
    raise ModelError(
        f"{file.path} scales its rotary positions in a way ({kind!r}) that is not supported: "
        "allowed are none, linear and Llama 3's. Use the model's Hugging Face folder."
    )


def _llama3_factors(theta: float, head_dim: int, scaling: dict[str, Any]) -> np.ndarray:
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _hf_name(name: str, file: GGUFFile) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    inside = _INSIDE_GEMMA3 if file.architecture == "gemma3" else _INSIDE
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if found is None or found.group(2) not in inside:
        raise ModelError(f"{file.path} has a tensor {name!r} that {file.architecture} has not.")
    return f"model.layers.{int(found.group(1))}.{inside[found.group(2)]}.{found.group(3)}"


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))  # GGUF counts from the fastest


def _values(file: GGUFFile, old: str, new: str, config: dict[str, Any]) -> np.ndarray:
    from gguf import dequantize

    tensor = file.tensors[old]
    try:
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        value = value.reshape(_shape(tensor))
    except (NotImplementedError, ValueError) as error:
        raise ModelError(f"{file.path}: {old} cannot be dequantised: {error}.") from None
    if file.architecture == "llama" and ".self_attn.q_proj." in new:
        return _unpermute(value, config["num_attention_heads"])
    if file.architecture == "llama" and ".self_attn.k_proj." in new:
        return _unpermute(value, config["num_key_value_heads"])
    if file.architecture == "gemma3" and new.endswith("norm.weight"):
        return value - 1  # the file holds 1 + w
    return value


def _unpermute(value: np.ndarray, heads: int) -> np.ndarray:
    """Undo the row order of llama's files: rotated pairs lie together there, halves in ours."""
    rows = value.shape[0]
    pairs = value.reshape(heads, rows // heads // 2, 2, *value.shape[1:])  # (H, D/2, 2, ·)
    return pairs.swapaxes(1, 2).reshape(value.shape)  # (H·D, ·)


def _write_fp32(
    path: Path, shapes: dict[str, tuple[int, ...]], values: Iterator[np.ndarray], report: Report
) -> None:
    """Write a safetensors file without holding more than one tensor (its own specification)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    done = 0
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in values:
            file.write(np.ascontiguousarray(value, dtype="<f4").data)
            done += value.nbytes
            report(done / place)


def _check_header(path: Path) -> None:
    try:
        with path.open("rb") as file:
            head = file.read(24)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from None
    if len(head) < 24 or head[:4] != b"GGUF":
        raise ModelError(f"{path} is no GGUF file: it begins with {head[:4]!r}, not with b'GGUF'.")
    version, tensors, keys = struct.unpack("<IQQ", head[4:])
    if version not in (2, 3) or tensors > _MOST_TENSORS or keys > _MOST_KEYS:
        raise ModelError(
            f"{path} says version {version}, {tensors} tensors, {keys} keys: allowed are version "
            f"2 or 3, at most {_MOST_TENSORS} and {_MOST_KEYS}. Copy it again."
        )


def _rounded(value: float) -> float:
    """Return an fp32 setting as the short decimal that was meant: 1e-05, not 9.99999974e-06."""
    return float(f"{float(value):.6g}")
