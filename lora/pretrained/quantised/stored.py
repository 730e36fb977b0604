"""Weights in bitsandbytes' nf4 as safetensors hold them: codes, and tensors beside them.

    X.weight                                  codes, two a byte, uint8 (n/2, 1); or the same bytes
                                              as another dtype (bnb_4bit_quant_storage)
    X.weight.quant_state.bitsandbytes__nf4    the bytes of a JSON object
    X.weight.quant_map                        the 16 levels, fp32
    X.weight.absmax                           the blocks' scales: fp32; 8-bit with double
                                              quantisation, and then there are also
    X.weight.nested_absmax, .nested_quant_map the scales of groups of scales, the 256 levels

https://huggingface.co/docs/transformers/quantization/bitsandbytes
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora.kernels.nf4 import GROUP, NF4_LEVELS, Nf4Tensor, dynamic_levels, n_blocks, unpack_nf4
from lora.pretrained.hf_files import StoredTensor
from lora.settings.checks import NF4_BLOCKS, is_nf4_block

STATE = ".quant_state.bitsandbytes__nf4"
MAP, SCALES = ".quant_map", ".absmax"
NESTED_SCALES, NESTED_MAP = ".nested_absmax", ".nested_quant_map"
COMPANIONS = (STATE, MAP, SCALES, NESTED_SCALES, NESTED_MAP)
VALUE_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Dtypes of the values before they were quantised, and their names in safetensors."""
MAX_STATE_BYTES = 2**12
"""Several times what is written: the product of two sizes then has few enough digits to print."""
MAX_OFFSET = torch.finfo(torch.float32).max
MAP_TOLERANCE = 1e-6
"""Of the 16 levels: bitsandbytes' kernels have their own, whatever the file says."""
_STORAGE = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4, "F64": 8}
"""Bytes of an element by the dtype that codes are stored as."""

Read = Callable[[StoredTensor], Tensor]


@dataclass(frozen=True)
class StoredNf4:
    """A weight (O, I) in nf4 in open files; nothing is read before `packed`."""

    codes: StoredTensor
    companions: Mapping[str, StoredTensor]
    """By their endings."""
    shape: tuple[int, ...]
    dtype: str
    """Of the values, as safetensors names it."""
    block: int
    offset: float
    group: int
    """Scales that share a scale; 0 without double quantisation."""
    is_double: bool
    """Whether the scales stay 8-bit codes when it is loaded."""

    @property
    def path(self) -> Path:
        """The file with the codes."""
        return self.codes.path

    @property
    def name(self) -> str:
        """The weight's name."""
        return self.codes.name

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """Every tensor of the file that belongs to it."""
        return (self.codes, *self.companions.values())

    def packed(
        self, device: torch.device | str = "cpu", read: Read = StoredTensor.tensor
    ) -> Nf4Tensor:
        """Return the weight as it is in the file, on `device`: nothing is unpacked.

        Scales in groups of another size, or with other levels than bitsandbytes has today, become
        fp32 scales of the same values.
        """
        rows, width = self.shape
        codes = read(self.codes).contiguous().view(torch.uint8).reshape(rows, width // 2)
        scales = read(self.companions[SCALES])
        if not self.group:
            single = (scales.float(), torch.empty(0), torch.zeros(()))
            return _on(device, codes, *single, self.block)
        groups = read(self.companions[NESTED_SCALES]).float()
        offset = torch.tensor(self.offset, dtype=torch.float32)
        if self.is_double:
            return _on(device, codes, scales, groups, offset, self.block)
        levels = read(self.companions[NESTED_MAP]).float()
        of_group = torch.arange(len(scales)) // min(self.group, len(scales))
        wide = levels[scales.int()] * groups[of_group] + offset
        return _on(device, codes, wide, torch.empty(0), torch.zeros(()), self.block)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Return the values (O, I)."""
        out = torch.empty(self.shape, dtype=dtype)
        unpack_nf4(self.packed(), out)
        return out


def _on(
    device: torch.device | str,
    codes: Tensor,
    scales: Tensor,
    group_scales: Tensor,
    offset: Tensor,
    block: int,
) -> Nf4Tensor:
    return Nf4Tensor(
        codes.to(device), scales.to(device), group_scales.to(device), offset.to(device), block
    )


def collect_packed(
    source: Mapping[str, StoredTensor],
) -> tuple[dict[str, StoredTensor | StoredNf4], list[str]]:
    """Return the tensors of a folder, those of each packed weight as one, and all faults."""
    states = [name for name in source if name.endswith(STATE)]
    taken: set[str] = set()
    packed: dict[str, StoredNf4] = {}
    faults: list[str] = []
    for state in states:
        name = state.removesuffix(STATE)
        own = {end: source[name + end] for end in COMPANIONS if name + end in source}
        taken |= {name, *(name + end for end in own)}
        weight, found = _weight(name, source.get(name), own)
        faults += [f"{name} {fault}" for fault in found]
        if weight is not None:
            packed[name] = weight
    orphans = _without_state(source, taken)
    faults += [f"{name}{STATE} is missing: {', '.join(of)} cannot be read" for name, of in orphans]
    taken |= {name for _, of in orphans for name in of}
    plain = {name: tensor for name, tensor in source.items() if name not in taken}
    return {**plain, **packed}, faults


def _without_state(
    source: Mapping[str, StoredTensor], taken: set[str]
) -> list[tuple[str, list[str]]]:
    """Return weights that have companions and no state, with the names of all these."""
    found: dict[str, list[str]] = {}
    for name in source:
        for end in COMPANIONS[1:]:
            weight = name.removesuffix(end)
            if weight != name and name not in taken:
                found.setdefault(weight, [weight] if weight in source else []).append(name)
                break
    return list(found.items())


def _weight(
    name: str, codes: StoredTensor | None, own: Mapping[str, StoredTensor]
) -> tuple[StoredNf4 | None, list[str]]:
    """Return a packed weight, and what is wrong with it: None if anything is."""
    if codes is None:
        return None, [f"is missing: its {STATE[1:]} is there"]
    state, faults = _read_state(own[STATE])
    if faults:
        return None, faults
    group = state.get("nested_blocksize", 0)
    needed = (MAP, SCALES, *((NESTED_SCALES, NESTED_MAP) if group else ()))
    missing = [f"{name}{end}" for end in needed if end not in own]
    if missing:
        return None, [f"cannot be unpacked without {', '.join(missing)}: missing"]
    spare = [f"{name}{end}" for end in own if end not in (STATE, *needed)]
    if spare:
        return None, [f"has {', '.join(spare)} beside it, and its state names no nested_blocksize"]
    weight = StoredNf4(
        codes,
        own,
        tuple(state["shape"]),
        VALUE_KINDS[state["dtype"]],
        state["blocksize"],
        float(state.get("nested_offset", 0.0)),
        group,
        is_double=False,
    )
    faults = _size_faults(weight) or _map_faults(weight)
    if faults:
        return None, faults
    return replace(weight, is_double=group == GROUP and _has_usual_levels(own[NESTED_MAP])), []


def _read_state(stored: StoredTensor) -> tuple[dict[str, Any], list[str]]:
    """Return the JSON object beside a weight, and what is wrong with it."""
    where = f"has a damaged {STATE[1:]}"
    if stored.dtype != "U8" or math.prod(stored.shape) > MAX_STATE_BYTES:
        return {}, [f"{where}: {stored.dtype} {stored.shape}, and the bytes of JSON are needed"]
    try:
        state = json.loads(bytes(stored.tensor().flatten().tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return {}, [f"{where}: it is no JSON ({error})"]
    if not isinstance(state, dict):
        return {}, [f"{where}: it is a {type(state).__name__}, and a JSON object is needed"]
    return state, [f"{where}: {fault}" for fault in _state_faults(state)]


def _state_faults(state: Mapping[str, Any]) -> list[str]:
    faults = []
    kind, shape, block = state.get("quant_type"), state.get("shape"), state.get("blocksize")
    if kind != "nf4":
        faults.append(f"quant_type={kind!r} (allowed: 'nf4')")
    is_shape = isinstance(shape, list) and len(shape) == 2
    if not is_shape or not all(_is_count(size) for size in shape or ()):
        faults.append(f"shape={shape!r} (allowed: two sizes, outputs and inputs)")
    elif shape is not None and shape[1] % 2:
        faults.append(f"shape={shape!r} (allowed: an even number of inputs)")
    if not is_nf4_block(block):
        faults.append(f"blocksize={block!r} (allowed: {', '.join(map(str, NF4_BLOCKS))})")
    if str(state.get("dtype")) not in VALUE_KINDS:
        faults.append(f"dtype={state.get('dtype')!r} (allowed: {', '.join(VALUE_KINDS)})")
    if any(name.startswith("nested_") for name in state):
        group, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if not _is_count(group):
            faults.append(f"nested_blocksize={group!r} (allowed: an int from 1 on)")
        if (
            isinstance(offset, bool)
            or not isinstance(offset, int | float)
            or not (
                abs(offset) <= MAX_OFFSET  # not NaN, nor an int beyond any float
            )
        ):
            faults.append(f"nested_offset={offset!r} (allowed: a number)")
        if state.get("nested_dtype", "float32") != "float32":
            faults.append(f"nested_dtype={state['nested_dtype']!r} (allowed: 'float32')")
    return faults


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _size_faults(weight: StoredNf4) -> list[str]:
    """Return the tensors of `weight` whose sizes or dtypes do not go together."""
    n_values = math.prod(weight.shape)
    blocks = n_blocks(n_values, weight.block)
    codes = weight.codes
    if codes.dtype not in _STORAGE:
        return [f"has dtype {codes.dtype} (allowed for codes: {', '.join(_STORAGE)})"]
    n_bytes = math.prod(codes.shape) * _STORAGE[codes.dtype]
    if 2 * n_bytes != n_values:
        return [
            f"has {n_bytes:,} bytes of codes: its quant_state has shape {weight.shape}, which "
            f"takes {n_values // 2:,}"
        ]
    faults = []
    wanted = {MAP: (len(NF4_LEVELS), "F32"), SCALES: (blocks, "U8" if weight.group else "F32")}
    if weight.group:
        wanted[NESTED_SCALES] = (n_blocks(blocks, weight.group), "F32")
        wanted[NESTED_MAP] = (256, "F32")
    for end, (size, kind) in wanted.items():
        seen = weight.companions[end]
        if math.prod(seen.shape) != size or seen.dtype != kind:
            faults.append(f"has {end[1:]} {seen.dtype} {seen.shape}: {kind} ({size},) is needed")
    return faults


def _has_usual_levels(stored: StoredTensor) -> bool:
    """Whether the 256 levels are, to the bit, those that `lora.kernels.nf4` has."""
    levels = stored.tensor().flatten()
    return bool(torch.equal(levels, dynamic_levels(levels)))


def _map_faults(weight: StoredNf4) -> list[str]:
    levels = weight.companions[MAP].tensor().flatten()
    if bool(((levels - torch.tensor(NF4_LEVELS)).abs() <= MAP_TOLERANCE).all()):
        return []
    return ["has a quant_map of other levels than nf4's, which bitsandbytes never reads"]
