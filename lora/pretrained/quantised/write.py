"""A model folder with weights in bitsandbytes' nf4, as transformers writes and loads it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora.kernels.nf4 import GROUP, NF4_LEVELS, Nf4Tensor, dynamic_levels, n_blocks
from lora.pretrained.load.shards import split_into_shards, write_json, write_shards, writing_into
from lora.pretrained.quantised.methods import without_settings
from lora.pretrained.quantised.stored import (
    MAP,
    NESTED_MAP,
    NESTED_SCALES,
    SCALES,
    STATE,
)
from lora.runs.tensor_files import TensorParts

MAX_SHARD_BYTES = 2**30
"""Largest size of a shard where possible: its packed weights are in memory while it is written."""
_KINDS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_BESIDE_BYTES = 2**11
"""About what a weight's tables and its JSON take in a file."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight (O, I) that is written in nf4."""

    shape: tuple[int, int]
    dtype: torch.dtype
    """Of the values that others unpack it into: float32, float16 or bfloat16."""
    block: int
    double_quant: bool
    pack: Callable[[], Nf4Tensor]
    """Quantises it, or returns what is quantised already; called once."""

    @property
    def n_bytes(self) -> int:
        """About its size in a file."""
        blocks = n_blocks(math.prod(self.shape), self.block)
        scales = blocks + 4 * n_blocks(blocks, GROUP) if self.double_quant else 4 * blocks
        return math.prod(self.shape) // 2 + scales + _BESIDE_BYTES


def write_4bit_folder(
    config: Mapping[str, Any],
    weights: Mapping[str, TensorParts | PackedWeight],
    folder: Path,
    *,
    plain_linears: tuple[str, ...],
    compute_dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json and `weights`, by the names that files have, into `folder`.

    `config` is the model's; what it says of a quantisation is replaced. `plain_linears` are the
    modules that are linears and stay as they are, the output head among them: transformers
    must not expect codes there. Every file is written under a temporary name and then renamed.
    Raises CheckpointError if writing fails.
    """
    sizes = {name: _n_bytes(weight) for name, weight in weights.items()}
    shards = split_into_shards(sizes, max_shard_bytes)
    with writing_into(folder):
        write_shards(folder, shards, lambda name: _layout(name, weights[name]), sum(sizes.values()))
        packed = [weight for weight in weights.values() if isinstance(weight, PackedWeight)]
        is_double = any(weight.double_quant for weight in packed)
        settings = _settings(is_double, compute_dtype, plain_linears)
        contents = {**without_settings(config), "quantization_config": settings}
        contents["torch_dtype"] = _KINDS[compute_dtype]
        contents.pop("dtype", None)  # the newer name of the same setting
        write_json(folder / "config.json", contents)


def _n_bytes(weight: TensorParts | PackedWeight) -> int:
    if isinstance(weight, PackedWeight):
        return weight.n_bytes
    return math.prod(weight.shape) * weight.dtype.itemsize


def _layout(name: str, weight: TensorParts | PackedWeight) -> dict[str, TensorParts]:
    """Return the tensors of a file that hold a weight; a packed one is quantised here."""
    if isinstance(weight, TensorParts):
        return {name: weight}
    packed = weight.pack()
    tensors = {
        name: packed.codes.view(-1, 1),
        name + SCALES: packed.scales,
        name + MAP: torch.tensor(NF4_LEVELS),
        name + STATE: _state(weight, packed),
    }
    if packed.is_double:
        tensors[name + NESTED_SCALES] = packed.group_scales
        tensors[name + NESTED_MAP] = dynamic_levels(packed.scales)
    return {key: _whole(tensor) for key, tensor in tensors.items()}


def _whole(tensor: Tensor) -> TensorParts:
    return TensorParts(tensor.dtype, tuple(tensor.shape), lambda: iter((tensor,)))


def _state(weight: PackedWeight, packed: Nf4Tensor) -> Tensor:
    """Return the bytes of the JSON object that bitsandbytes reads beside a weight, uint8."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": packed.block,
        "dtype": _KINDS[weight.dtype],
        "shape": list(weight.shape),
    }
    if packed.is_double:
        state["nested_blocksize"] = GROUP
        state["nested_dtype"] = "float32"
        state["nested_offset"] = packed.offset.item()
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def _settings(
    is_double: bool, compute_dtype: torch.dtype, plain_linears: tuple[str, ...]
) -> dict[str, Any]:
    """Return quantization_config as transformers 5 writes it."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": _KINDS[compute_dtype],
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": is_double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(plain_linears),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
