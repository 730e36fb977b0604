"""Decoders written as GGUF files: the inverse of `lora.pretrained.gguf_weights`.

Source of keys and names: the GGUF specification and its tables of architectures; of what llama.cpp
assumes about an architecture: llama.cpp.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lora.decoder.config import DecoderConfig, RopeConfig
from lora.errors import ModelError, gather
from lora.pretrained.gguf_config import (
    ARCHITECTURES,
    GEMMA2_27B_LAYERS,
    GEMMA3_27B_LAYERS,
    LLAMA3,
    LONG_FACTORS,
    OFFSET_NORMS,
    PERMUTED,
    ROPE_FACTORS,
    SHORT_FACTORS,
    llama3_factors,
)
from lora.pretrained.gguf_file import rows_per_block
from lora.pretrained.gguf_weights import INSIDE, INSIDE_OTHERS, OUTSIDE, permute

GGUFType = Literal["f32", "f16", "q8_0"]
"""How matrices are stored; norms and biases are always F32."""

_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}  # general.file_type
_Q8_BLOCK = 32


def describe_decoder(config: DecoderConfig) -> dict[str, Any]:
    """Return the settings of a GGUF file for `config`, key to plain value.

    Raises ModelError for a family without a GGUF architecture, and one ModelError for everything
    in which `config` differs from what llama.cpp assumes about the architecture.
    """
    architecture = ARCHITECTURES.get(config.family)
    if architecture is None:
        raise ModelError(
            f"Cannot write a {config.family!r} model as GGUF. Supported families: "
            f"{', '.join(ARCHITECTURES)}. Keep the model as a Hugging Face folder."
        )
    faults = _faults(config)
    ropes = {layer.window_tokens is None: layer.rope for layer in config.layers if layer.rope}
    settings: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": _rotary_dim(config),
        "vocab_size": config.vocab_size,
    }
    if True in ropes:
        settings |= _rope_settings(ropes[True], architecture, faults)
    elif False in ropes and architecture in ("gemma2", "olmo2"):  # all blocks have a window
        settings |= _rope_settings(ropes[False], architecture, faults)
    if architecture in _SLIDES and any(la.window_tokens is not None for la in config.layers):
        settings |= _window_settings(config, ropes.get(False), faults)
    windows = {layer.window_tokens for layer in config.layers} - {None}
    if architecture == "phi3" and windows:
        settings["attention.sliding_window"] = windows.pop()
    settings |= _scale_settings(config, architecture, faults)
    if faults:
        heading = f"Cannot write the model as GGUF's {architecture!r}:"
        raise ModelError(gather(faults, heading, "Keep the model as a Hugging Face folder."))
    named = {f"{architecture}.{key}": value for key, value in settings.items()}
    return {"general.architecture": architecture, **named}


_SLIDES = {"gemma2": 2, "gemma3": None, "olmo2": None}
"""Architectures whose files may say that blocks have a window -> how many blocks follow each other
until one has none; None: a file says how many."""
_WITHOUT_BIASES = ("smollm3", "phi3", "olmo2", "gemma2", "gemma3")
_NO_ROPE_INTERVAL = 4  # every fourth block of smollm3


def _faults(config: DecoderConfig) -> list[str]:
    architecture = ARCHITECTURES[config.family]
    activation = "gelu_pytorch_tanh" if architecture in OFFSET_NORMS else "silu"
    faults = []
    if config.feed_forward.activation != activation:
        faults.append(f"its activation is {config.feed_forward.activation}, not {activation}")
    divisor: float = config.head_dim
    of_27b = {"gemma2": GEMMA2_27B_LAYERS, "gemma3": GEMMA3_27B_LAYERS}.get(architecture)
    if config.num_hidden_layers == of_27b:
        divisor = config.hidden_size // config.num_attention_heads
    scales = {layer.scale for layer in config.layers}
    if architecture != "granite" and any(not math.isclose(s, divisor**-0.5) for s in scales):
        faults.append(f"its attention logits are not scaled by 1 / √{divisor}")
    biases = config.attention.qkv_bias or config.attention.output_bias or config.feed_forward.bias
    if biases and architecture in _WITHOUT_BIASES:
        faults.append("its linears have biases")
    whole = config.num_attention_heads * config.head_dim
    if architecture in ("olmo2", "phi3") and whole != config.hidden_size:
        faults.append(f"its heads together have {whole} dimensions, not {config.hidden_size}")
    if architecture == "olmo2" and config.tie_word_embeddings:
        faults.append("its output head is tied to the embedding")
    if architecture == "gemma2" and not config.tie_word_embeddings:
        faults.append("its output head is not tied to the embedding")
    return faults + _window_faults(config, architecture) + _rope_faults(config, architecture)


def _window_faults(config: DecoderConfig, architecture: str) -> list[str]:
    windows = {layer.window_tokens for layer in config.layers} - {None}
    if architecture == "phi3" and all((w or 0) >= config.max_position_embeddings for w in windows):
        return []  # without effect
    if windows and architecture not in _SLIDES:
        return ["some of its blocks have a sliding window, which llama.cpp would not apply"]
    if not windows and _SLIDES.get(architecture) is not None:
        return ["none of its blocks has a sliding window"]
    return []


def _rope_faults(config: DecoderConfig, architecture: str) -> list[str]:
    faults = []
    kinds = {(layer.rope, layer.window_tokens is None) for layer in config.layers if layer.rope}
    if len(kinds) > 1 + (architecture in _SLIDES):
        faults.append("its blocks have different rotary embeddings")
    have_rope = [layer.rope is not None for layer in config.layers]
    every = _NO_ROPE_INTERVAL if architecture == "smollm3" else len(have_rope) + 1
    if have_rope != [bool((number + 1) % every) for number in range(len(have_rope))]:
        where = (
            f"blocks other than every {every}th"
            if architecture == "smollm3"
            else "some of its blocks"
        )
        faults.append(f"{where} have no rotary embedding")
    return faults


def _rotary_dim(config: DecoderConfig) -> int:
    widths = {layer.rope.rotary_dim for layer in config.layers if layer.rope is not None}
    return next((width for width in widths if width is not None), config.head_dim)


def _scale_settings(config: DecoderConfig, architecture: str, faults: list[str]) -> dict[str, Any]:
    """Return Granite's multipliers or Gemma 2's soft caps."""
    if architecture == "granite":
        return {
            "attention.scale": float(config.layers[0].scale),
            "embedding_scale": float(config.embedding_scale),
            "residual_scale": float(config.residual_multiplier),
            "logit_scale": 1 / config.logit_scale,
        }
    if architecture != "gemma2":
        return {}
    caps = {
        "attn_logit_softcapping": config.attention.logit_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }
    faults.extend(f"{name} is null" for name, cap in caps.items() if cap is None)
    return {name: float(cap) for name, cap in caps.items() if cap is not None}


def _rope_settings(rope: RopeConfig | None, architecture: str, faults: list[str]) -> dict[str, Any]:
    if rope is None:
        return {}
    settings: dict[str, Any] = {"rope.freq_base": float(rope.rope_theta)}
    if rope.rope_type in ("linear", "yarn"):
        settings["rope.scaling.type"] = rope.rope_type
        settings["rope.scaling.factor"] = float(rope.factor)
    if rope.rope_type == "yarn":
        settings["rope.scaling.original_context_length"] = rope.original_max_position_embeddings
        usual = RopeConfig(1.0)
        same = (rope.beta_fast, rope.beta_slow, rope.truncate)
        usual_factor = 0.1 * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0
        if same != (usual.beta_fast, usual.beta_slow, usual.truncate):
            faults.append(
                "its YaRN has other beta_fast and beta_slow than 32 and 1, or does not truncate"
            )
        if not math.isclose(rope.attention_factor, usual_factor, rel_tol=1e-6):
            faults.append(f"its YaRN scales by {rope.attention_factor}, not by {usual_factor:.6g}")
    if rope.rope_type == "longrope":
        settings["rope.scaling.original_context_length"] = rope.original_max_position_embeddings
        settings["rope.scaling.attn_factor"] = float(rope.attention_factor)
        if architecture != "phi3":
            faults.append("its rotary embedding is scaled by longrope")
    usual_llama3 = LLAMA3.items() <= dataclasses.asdict(rope).items()
    if rope.rope_type == "llama3" and not usual_llama3:
        faults.append("its llama3 scaling is not that of Llama 3.1 to 3.3")
    if rope.rope_type == "llama3" and architecture in _WITHOUT_LLAMA3:
        faults.append("its rotary embedding has llama3 scaling")
    return settings


_WITHOUT_LLAMA3 = ("smollm3", "olmo2", "gemma2", "gemma3", "phi3")


def _window_settings(
    config: DecoderConfig, local: RopeConfig | None, faults: list[str]
) -> dict[str, Any]:
    slides = [layer.window_tokens is not None for layer in config.layers]
    windows = {layer.window_tokens for layer in config.layers} - {None}
    every = slides.index(False) + 1 if False in slides else len(slides) + 1
    fixed = _SLIDES[ARCHITECTURES[config.family]]
    if fixed is not None and every != min(fixed, len(slides) + 1):
        faults.append(f"its blocks without a window are not those of a period of {fixed}")
    if len(windows) != 1 or slides != [bool((n + 1) % every) for n in range(len(slides))]:
        faults.append("its windows differ in size, or do not follow a regular pattern")
    if local is not None and local.rope_type != "default":
        faults.append("its blocks with a window have rope scaling")
    settings: dict[str, Any] = {"attention.sliding_window_pattern": every}
    if windows:
        settings["attention.sliding_window"] = windows.pop()
    if local is not None and config.family == "gemma3_text":
        settings["rope.freq_base_swa"] = float(local.rope_theta)
    elif any(la.rope and la.rope.rope_theta != local.rope_theta for la in config.layers if local):
        faults.append("its blocks with a window have another rope_theta")
    return settings


def name_tensors(config: DecoderConfig, names: list[str]) -> dict[str, str]:
    """Return a dict from Hugging Face's names to GGUF's."""
    table = INSIDE_OTHERS.get(ARCHITECTURES[config.family], INSIDE)
    inside = {new: old for old, new in table.items()}
    outside = {new: old for old, new in OUTSIDE.items()}
    named = {}
    for name in names:
        stem, _, ending = name.rpartition(".")
        if stem in outside:
            named[name] = f"{outside[stem]}.{ending}"
        else:
            _, _, number, module = stem.split(".", 3)
            named[name] = f"blk.{number}.{inside[module]}.{ending}"
    return named


def file_blocks(config: DecoderConfig, name: str, tensor: Tensor) -> Iterator[np.ndarray]:
    """Yield the fp32 values that a GGUF file holds for the parameter `name`, (rows, row length).

    The blocks have the rows of `GGUFFile.blocks`; only q and k of llama are in fp32 as a whole.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    module, architecture = name.split(".")[-2], ARCHITECTURES[config.family]
    if architecture in PERMUTED and module in heads:
        tensor = torch.from_numpy(permute(_fp32(tensor), heads[module]))
    rows = tensor.detach().reshape(-1, tensor.shape[-1])  # (rows, row length)
    for block in rows.split(rows_per_block(tensor.shape[-1])):
        value = _fp32(block)
        is_offset = architecture in OFFSET_NORMS and module.endswith("norm")
        yield value + 1 if is_offset else value


def _fp32(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(device="cpu", dtype=torch.float32).numpy()


def write_gguf(
    path: Path,
    config: DecoderConfig,
    shapes: Mapping[str, tuple[int, ...]],
    blocks_of: Callable[[str], Iterator[np.ndarray]],
    metadata: Mapping[str, Any],
    kind: GGUFType,
) -> None:
    """Write parameters (Hugging Face's names) and `metadata` to `path`, block by block of rows.

    `blocks_of` gives those of `file_blocks`, for one of the `shapes` after the other.

    Under q8_0, matrices whose rows do not divide into blocks of 32 are stored as F16. Raises
    ModelError for values that the type cannot hold.
    """
    from gguf import GGUFWriter
    from gguf.quants import quantize

    names = name_tensors(config, list(shapes))
    factors = _rope_factors(config)
    writer = GGUFWriter(path, str(metadata["general.architecture"]))
    of_file = {"general.file_type": _FILE_TYPES[kind], "general.quantization_version": 2}
    for key, value in {**metadata, **of_file}.items():
        if key != "general.architecture":  # the writer sets it itself
            _add_setting(writer, key, value)
    for old, new in names.items():
        _announce(writer, new, shapes[old], kind)
    for new, value in factors.items():
        _announce(writer, new, value.shape, "f32")
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for old in names:
            own = _type_of(shapes[old], kind)
            blocks = (_checked(block, own, old) for block in blocks_of(old))
            _write_blocks(writer, (quantize(block, own) for block in blocks))
        for value in factors.values():
            _write_blocks(writer, iter([value]))
    finally:
        writer.close()


def _checked(block: np.ndarray, own: Any, name: str) -> np.ndarray:
    limit = np.finfo(np.float16).max
    if own.name == "F16" and (block.max() > limit or block.min() < -limit):
        raise ModelError(
            f"Cannot store {name} as f16: it has values beyond ±65,504. Write the model as f32 "
            "instead."
        )
    return block


def _write_blocks(writer: Any, blocks: Iterator[np.ndarray]) -> None:
    # As GGUFWriter.write_tensor_data does, which needs the whole tensor in memory.
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    for block in blocks:
        block.tofile(file)
    writer.write_padding(file, file.tell())


def _announce(writer: Any, name: str, shape: tuple[int, ...], kind: GGUFType) -> None:
    from gguf.quants import quant_shape_to_byte_shape

    own = _type_of(shape, kind)
    width = np.dtype({"F32": np.float32, "F16": np.float16}.get(own.name, np.uint8))
    stored = quant_shape_to_byte_shape(shape, own) if width == np.uint8 else shape
    writer.add_tensor_info(name, stored, width, math.prod(stored) * width.itemsize, raw_dtype=own)


def _type_of(shape: tuple[int, ...], kind: GGUFType) -> Any:
    from gguf import GGMLQuantizationType

    if len(shape) == 1 or kind == "f32":
        return GGMLQuantizationType.F32
    if kind == "f16" or shape[-1] % _Q8_BLOCK:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType.Q8_0


def _rope_factors(config: DecoderConfig) -> dict[str, np.ndarray]:
    rope = config.layers[0].rope
    if rope is not None and rope.rope_type == "longrope":
        named = (LONG_FACTORS, rope.long_factor), (SHORT_FACTORS, rope.short_factor)
        return {name: np.array(factors, np.float32) for name, factors in named}
    if rope is None or rope.rope_type != "llama3":
        return {}
    factors = llama3_factors(rope.rope_theta, config.head_dim, {**LLAMA3, "factor": rope.factor})
    return {ROPE_FACTORS: factors.astype(np.float32)}


def _add_setting(writer: Any, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, list: writer.add_array}
    add[type(value)](key, value)
