"""Packed weights in files: read to the bit as bitsandbytes dequantises them, faults by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora.kernels.nf4 import unpack_nf4
from lora.pretrained.hf_files import open_tensors
from lora.pretrained.quantised.stored import StoredNf4, collect_packed
from tests.pretrained.quantised.four_bit import unpacked

NAME = "layers.0.q_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def quantised(
    shape: tuple[int, int] = (48, 40), dtype: torch.dtype = torch.bfloat16, **options: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors that bitsandbytes writes of a random weight, and its values."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", **options)
    tensors = {f"{NAME}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    return {NAME: codes, **tensors}, unpacked(codes, state)


def collected(
    tensors: dict[str, Tensor], folder: Path, files: ExitStack
) -> tuple[StoredNf4 | None, list[str]]:
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / "model.safetensors")
    found, faults = collect_packed(open_tensors(folder, files))
    weight = found.get(NAME)
    assert all(not key.startswith(f"{NAME}.") for key in found)
    return (weight if isinstance(weight, StoredNf4) else None), faults


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"compress_statistics": True},
        {"compress_statistics": False},
        {"compress_statistics": True, "blocksize": 32},
        {"compress_statistics": True, "blocksize": 512},  # the last block is shorter
        {"compress_statistics": True, "quant_storage": torch.bfloat16},
        {"compress_statistics": False, "quant_storage": torch.float32},
        {"compress_statistics": True, "quant_storage": torch.int8},
    ],
    ids=str,
)
def test_values_are_those_of_bitsandbytes(
    tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    tensors, values = quantised(dtype=dtype, **options)
    with ExitStack() as files:
        weight, faults = collected(tensors, tmp_path, files)
        assert not faults
        assert weight is not None
        packed = weight.packed()
        assert (weight.shape, weight.block) == ((48, 40), options.get("blocksize", 64))
        assert weight.is_double is packed.is_double is options["compress_statistics"]
        out = torch.empty(48, 40, dtype=dtype)
        unpack_nf4(packed, out)
    assert torch.equal(out, values)


def test_levels_of_other_files_are_honoured(tmp_path: Path) -> None:
    """Tables of an older torch may differ in the last bit: the scales become fp32."""
    functional = pytest.importorskip("bitsandbytes.functional")
    tensors, _ = quantised(compress_statistics=True)
    levels = tensors[f"{NAME}.nested_quant_map"]
    tensors[f"{NAME}.nested_quant_map"] = levels * (1 + 2**-20)
    parts = {key.removeprefix(f"{NAME}."): tensor for key, tensor in tensors.items()}
    codes = parts.pop(NAME)
    state = functional.QuantState.from_dict(parts, torch.device("cpu"))
    with ExitStack() as files:
        weight, faults = collected(tensors, tmp_path, files)
        assert not faults
        assert weight is not None
        packed = weight.packed()
        assert weight.is_double is packed.is_double is False
        out = torch.empty(48, 40, dtype=torch.bfloat16)
        unpack_nf4(packed, out)
    assert torch.equal(out, unpacked(codes, state))


def test_one_group_for_all_scales_costs_no_memory(tmp_path: Path) -> None:
    tensors, values = quantised(compress_statistics=True)
    state_with(nested_blocksize=10**40)(tensors)
    with ExitStack() as files:
        weight, _ = collected(tensors, tmp_path, files)
        assert weight is not None
        assert torch.equal(weight.unpacked(torch.bfloat16), values)


def state_with(**fields: Any) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        state = json.loads(bytes(tensors[STATE].tolist()))
        state = {key: v for key, v in {**state, **fields}.items() if v is not ...}
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def replaced(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


def removed(*names: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: [tensors.pop(name) for name in names] and None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (removed(f"{NAME}.absmax"), f"{NAME} cannot be unpacked without {NAME}.absmax: missing"),
        (removed(f"{NAME}.nested_absmax"), f"without {NAME}.nested_absmax"),
        (removed(f"{NAME}.quant_map", f"{NAME}.nested_quant_map"), "quant_map, layers"),
        (removed(NAME), f"{NAME} is missing: its quant_state.bitsandbytes__nf4 is there"),
        (removed(STATE), f"{STATE} is missing: {NAME}, {NAME}.absmax"),
        (replaced(STATE, torch.zeros(9, dtype=torch.uint8)), "it is no JSON"),
        (replaced(STATE, torch.zeros(70_000, dtype=torch.uint8)), "the bytes of JSON are needed"),
        (replaced(STATE, torch.tensor(list(b"[1]"), dtype=torch.uint8)), "it is a list"),
        (state_with(quant_type="fp4"), "quant_type='fp4' (allowed: 'nf4')"),
        (state_with(shape=[48]), "shape=[48] (allowed: two sizes"),
        (state_with(shape=[48, -40]), "shape=[48, -40]"),
        (state_with(shape=[40, 45]), "an even number of inputs"),
        (state_with(shape=[48, 42]), "has 960 bytes of codes: its quant_state has shape (48, 42)"),
        (state_with(blocksize=48), "blocksize=48 (allowed: 32, 64"),
        (state_with(blocksize=32), "has absmax U8 (30,): U8 (60,) is needed"),
        (state_with(dtype="int8"), "dtype='int8' (allowed: float32"),
        (state_with(nested_offset=float("nan")), "nested_offset=nan"),
        (state_with(nested_offset=10**400), "nested_offset=1000"),
        (state_with(nested_offset="0"), "nested_offset='0'"),
        (state_with(dtype=["float32"]), "dtype=['float32']"),
        (state_with(shape={"0": 48}), "shape={'0': 48}"),
        (state_with(blocksize="64"), "blocksize='64'"),
        (state_with(blocksize=True), "blocksize=True"),
        (state_with(shape=[10**40, 2]), "bytes of codes"),
        (state_with(shape=[10**1900, 10**1900]), "bytes of codes"),
        (state_with(shape=[10**3000, 10**3000]), "the bytes of JSON are needed"),
        (state_with(nested_blocksize=0), "nested_blocksize=0"),
        (state_with(nested_dtype="float16"), "nested_dtype='float16'"),
        (
            state_with(nested_blocksize=..., nested_dtype=..., nested_offset=...),
            "its state names no nested_blocksize",
        ),
        (replaced(f"{NAME}.quant_map", torch.linspace(-1, 1, 16)), "other levels than nf4's"),
        (replaced(f"{NAME}.absmax", torch.zeros(30)), "has absmax F32 (30,): U8 (30,) is needed"),
        (replaced(NAME, torch.zeros(960, 1, dtype=torch.int32)), "has dtype I32"),
    ],
)
def test_a_damaged_weight_is_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], words: str
) -> None:
    tensors, _ = quantised(compress_statistics=True)
    change(tensors)
    with ExitStack() as files:
        weight, faults = collected(tensors, tmp_path, files)
    assert weight is None
    assert len(faults) == 1
    assert faults[0].startswith(NAME)
    assert words in faults[0]
