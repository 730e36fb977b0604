"""GGUF files converted to a Hugging Face folder: config.json, model.safetensors, tokenizer.json …

Values are dequantised to fp32, exactly as the `gguf` package defines them, and written block by
block, so memory stays far below the model's size. Where the formats differ, values are converted
back: llama's files hold the rows of q and k in another order, gemma's hold 1 + w for a norm's
weight w. Source of the names: the GGUF specification and its tables of architectures.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora.data.tokenizers.subword import TextTokenizer
from lora.data.tokenizers.tokenizer_trial import check_tokenizer
from lora.decoder.config import DecoderConfig
from lora.decoder.decoder import build_empty_decoder
from lora.decoder.families import decoder_config
from lora.errors import ModelError, gather
from lora.pretrained.gguf_config import (
    ARCHITECTURES,
    OFFSET_NORMS,
    PERMUTED,
    SETTING_TENSORS,
    gguf_config,
)
from lora.pretrained.gguf_file import GGUFFile
from lora.pretrained.gguf_tokenizer import build_gguf_tokenizer, is_ordinary

OnProgress = Callable[[float], None]
"""Called with the fraction of the work that is done, 0 to 1."""

OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
"""GGUF's names outside the blocks -> Hugging Face's; `.weight` follows both."""
INSIDE = {
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
"""GGUF's names inside a block -> Hugging Face's."""
_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA = INSIDE | _POST_NORMS | {"ffn_norm": "pre_feedforward_layernorm"}
_OLMO2 = {old: new for old, new in INSIDE.items() if old not in ("attn_norm", "ffn_norm")}
_PHI3 = {
    old: new
    for old, new in INSIDE.items()
    if old not in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
}
INSIDE_OTHERS = {
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "olmo2": _OLMO2 | _POST_NORMS,
    "phi3": _PHI3 | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
}
"""By architecture, where the names inside a block are others."""


def convert_gguf(path: Path, folder: Path, on_progress: OnProgress = lambda fraction: None) -> None:
    """Write the model and tokenizer in the GGUF file `path` into `folder`, in fp32.

    Raises ModelError for a file that is damaged, not supported, or whose tensors do not match its
    settings; nothing is written then.
    """
    file = GGUFFile(path)
    config = gguf_config(file)
    names = _match_names(file, config)
    _check_space(folder, 4 * sum(math.prod(file.tensors[old].shape) for old in names.values()))
    _build_tokenizer(file, config["vocab_size"]).save(folder)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    shapes = {new: file.tensors[old].shape for new, old in names.items()}
    blocks = (block for new, old in names.items() for block in _blocks(file, old, new, config))
    _write_fp32(folder / "model.safetensors", shapes, blocks, on_progress)


class GGUFWeights:
    """The parameters of the model in a GGUF file, read when they are asked for, in fp32.

    Raises ModelError as `convert_gguf` does.
    """

    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)
        self._config = gguf_config(self._file)
        self._names = _match_names(self._file, self._config)
        self.config = _decoder_config(self._file, self._config)

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the parameter `name` (Hugging Face's) in blocks of (rows, row length)."""
        for block in _blocks(self._file, self._names[name], name, self._config):
            yield torch.from_numpy(block.reshape(-1, block.shape[-1]))

    def tensor(self, name: str) -> torch.Tensor:
        """Return the parameter `name` (Hugging Face's)."""
        shape = self._file.tensors[self._names[name]].shape
        return torch.cat(list(self.blocks(name))).reshape(shape)


def _check_space(folder: Path, n_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if n_bytes > free_bytes:
        raise ModelError(
            f"Cannot convert the model: it takes {n_bytes / 1e9:.1f} GB in fp32, and "
            f"{folder.parent} has {free_bytes / 1e9:.1f} GB free. Free some space, or set "
            "LORALM_CACHE to a folder on another disk."
        )


def _build_tokenizer(file: GGUFFile, vocab_size: int) -> TextTokenizer:
    own = {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
    try:
        # In a subprocess first: the tokenizers library panics on some vocabularies, or never ends.
        check_tokenizer(file.path, json.dumps(own).encode(), build_gguf_tokenizer.__module__)
        tokenizer = build_gguf_tokenizer(own)
    except Exception as error:
        if not is_ordinary(error):
            raise
        raise ModelError(f"Cannot use the tokenizer in {file.path}: {error}") from None
    if tokenizer.vocab_size > vocab_size:
        raise ModelError(
            f"Cannot load {file.path}: it has {tokenizer.vocab_size:,} tokens, but its embedding "
            f"has {vocab_size:,} rows. Use another file."
        )
    return tokenizer


def _decoder_config(file: GGUFFile, config: dict[str, Any]) -> DecoderConfig:
    try:
        return decoder_config(config)
    except ModelError as error:  # settings that are right one by one, but not together
        _, _, faults = str(error).partition(":")
        advice = "Copy it again, or use another file."
        lines = [line.strip(" -") for line in faults.splitlines() if line.startswith("  - ")]
        heading = f"Cannot load {file.path}: its settings do not go together:"
        raise ModelError(gather(lines or [str(error)], heading, advice)) from None


def _match_names(file: GGUFFile, config: dict[str, Any]) -> dict[str, str]:
    """Return Hugging Face's name -> the file's; all faults are raised at once."""
    inside = INSIDE_OTHERS.get(ARCHITECTURES[config["model_type"]], INSIDE)
    names = {_hf_name(old, inside): old for old in file.tensors if old not in SETTING_TENSORS}
    model = build_empty_decoder(_decoder_config(file, config))
    wanted = {name: tuple(value.shape) for name, value in model.named_parameters()}
    faults = [f"{name} {wanted[name]} is missing" for name in wanted if name not in names]
    for new, old in names.items():
        if new not in wanted:
            faults.append(f"{old} is not a tensor of this architecture")
        elif file.tensors[old].shape != wanted[new]:
            seen = file.tensors[old].shape
            faults.append(f"{old} is {seen}: its settings imply {wanted[new]}")
    if faults:
        heading = f"Cannot load {file.path}: its tensors do not match its settings:"
        raise ModelError(gather(faults, heading, "Copy it again, or use another file."))
    return {name: names[name] for name in wanted}


def _hf_name(name: str, inside: dict[str, str]) -> str:
    """Return Hugging Face's name for `name`, or `name` if it is unknown."""
    stem, _, ending = name.rpartition(".")
    if stem in OUTSIDE and ending == "weight":
        return f"{OUTSIDE[stem]}.weight"
    found = re.fullmatch(r"blk\.(\d{1,6})\.(\w+)\.(weight|bias)", name)
    if found is None or found[2] not in inside:
        return name
    return f"model.layers.{int(found[1])}.{inside[found[2]]}.{found[3]}"


def _blocks(file: GGUFFile, old: str, new: str, config: dict[str, Any]) -> Iterator[np.ndarray]:
    """Yield the values of one tensor in Hugging Face's convention, in order."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    module, architecture = new.split(".")[-2], ARCHITECTURES[config["model_type"]]
    if architecture in PERMUTED and module in heads:
        yield unpermute(file.values(old), heads[module])
    elif architecture in OFFSET_NORMS and module.endswith("norm"):
        yield file.values(old) - 1
    else:
        yield from file.blocks(old)


def unpermute(value: np.ndarray, heads: int) -> np.ndarray:
    """Return q's or k's weight (H·D, C) or bias (H·D,), from llama's row order in GGUF files.

    There, the two rows of a rotated pair are adjacent; in Hugging Face's order they are half a
    head apart.
    """
    pairs = value.reshape(heads, -1, 2, *value.shape[1:])  # (H, D/2, 2, ·)
    return pairs.swapaxes(1, 2).reshape(value.shape)  # (H·D, ·)


def permute(value: np.ndarray, heads: int) -> np.ndarray:
    """Return q's or k's weight or bias in llama's row order: the inverse of `unpermute`."""
    halves = value.reshape(heads, 2, -1, *value.shape[1:])  # (H, 2, D/2, ·)
    return halves.swapaxes(1, 2).reshape(value.shape)  # (H·D, ·)


def _write_fp32(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    blocks: Iterator[np.ndarray],
    on_progress: OnProgress,
) -> None:
    """Write a safetensors file with no more than one block in memory (by its specification)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total_bytes = 0
    for name, shape in shapes.items():
        end = total_bytes + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [total_bytes, end]}
        total_bytes = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    done_bytes = 0
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype="<f4").data)
            done_bytes += block.nbytes
            on_progress(done_bytes / total_bytes)
        file.flush()
        os.fsync(file.fileno())  # a cached file is later trusted by its size alone
