"""Folders in 4 bits, as transformers and bitsandbytes write them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora.kernels.nf4 import quantise_nf4
from lora.pretrained.quantised.write import PackedWeight, write_4bit_folder
from lora.runs.tensor_files import TensorParts

QUANTISATION = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
}


def write_4bit(
    plain: Path,
    folder: Path,
    *,
    block: int = 64,
    double: bool = True,
    kind: str = "nf4",
    storage: torch.dtype = torch.uint8,
    skipped: Callable[[str], bool] = lambda name: False,
    transposed: bool = False,
    also: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Write the model in `plain` into `folder`, its blocks' linears quantised by bitsandbytes.

    Returns every parameter with the values that bitsandbytes gives it. `transposed`: the linears
    are (I, O) in `plain` (GPT-2), and (O, I) in 4 bits. `also` are quantised
    besides those of the blocks.
    """
    functional = pytest.importorskip("bitsandbytes.functional")
    shutil.copytree(plain, folder)
    tensors = load_file(folder / "model.safetensors")
    stored, values = {}, {}
    for name, tensor in tensors.items():
        is_linear = tensor.dim() == 2 and (".layers." in name or ".h." in name)
        if not (is_linear or name in also) or skipped(name):
            stored[name] = values[name] = tensor
            continue
        weight = (tensor.T if transposed else tensor).contiguous()
        codes, state = functional.quantize_4bit(
            weight, blocksize=block, compress_statistics=double, quant_type=kind,
            quant_storage=storage,
        )  # fmt: skip
        stored[name] = codes
        stored.update({f"{name}.{key}": t for key, t in state.as_dict(packed=True).items()})
        values[name] = unpacked(codes, state)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, quantization_config={**QUANTISATION, "bnb_4bit_quant_type": kind})
    return values


def write_4bit_ourselves(
    plain: Path, folder: Path, *, skipped: Callable[[str], bool] = lambda name: False
) -> None:
    """Write the native model in `plain` into `folder` in 4 bits, without bitsandbytes."""
    weights: dict[str, TensorParts | PackedWeight] = {}
    tensors = load_file(plain / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or ".layers." not in name or skipped(name):
            weights[name] = TensorParts(tensor.dtype, tuple(tensor.shape), partial(iter, (tensor,)))
        else:
            shape = tensor.shape[0], tensor.shape[1]
            pack = partial(quantise_nf4, tensor)
            weights[name] = PackedWeight(shape, tensor.dtype, 64, True, pack)
    shutil.copytree(plain, folder)
    left = tuple(name.removesuffix(".weight") for name in tensors if skipped(name))
    config = json.loads((plain / "config.json").read_text())
    write_4bit_folder(
        config, weights, folder, plain_linears=("lm_head", *left), compute_dtype=torch.float32
    )


def change_config(folder: Path, **fields: Any) -> None:
    """Change fields of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: v for name, v in config.items() if v is not None}))


def unpacked(codes: Tensor, state: Any) -> Tensor:
    """Return the values (O, I) that bitsandbytes gives codes; in whole blocks, with its tables.

    Its own kernel for AVX-512 is wrong where a row is no multiple of a block.
    """
    functional = pytest.importorskip("bitsandbytes.functional")
    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    pairs = codes.contiguous().view(torch.uint8).flatten()
    levels = state.code[torch.stack([pairs >> 4, pairs & 15], dim=1).flatten().int()]
    values = levels * scales.repeat_interleave(state.blocksize)[: len(levels)]
    return values.view(state.shape).to(state.dtype)
