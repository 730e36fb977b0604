"""An adapter's tensors by PEFT's names: those on a model, those a file should hold, and its faults.

The tensors of whole modules have the layout of Hugging Face's files: GPT-2's linears are (I, O).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lora.adapters.apply import applied_lora, lora_layers
from lora.adapters.peft_tokens import (
    FileRows,
    TokenIds,
    expected_token_tensors,
    trainable_token_tensors,
)
from lora.config import LoRAConfig
from lora.decoder.language_model import LanguageModel
from lora.decoder.quantised.base import QuantisedWeight
from lora.layers.conv1d import is_conv1d
from lora.lora_module import LoRALayer

PREFIX = "base_model.model."
_ADAPTER_NAME = re.compile(r"(\.(lora_A|lora_B|modules_to_save|trainable_tokens_delta))\.default\.")
_CHECKED_VALUES = 2**22
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the adapter on `model`, which can be written to, as a file has them."""
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_layers(model).items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B
    for name in applied_lora(model).originals:
        for key, tensor in model.get_submodule(name).state_dict().items():
            tensors[f"{PREFIX}{name}.{key}"] = _file_layout(model, f"{name}.{key}", tensor)
    token_rows = trainable_token_tensors(applied_lora(model))
    return tensors | {PREFIX + name: tensor for name, tensor in token_rows.items()}


def without_peft_wrappers(
    tensors: dict[str, Tensor], saved: Sequence[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return `tensors` by the names that PEFT writes as a rule, and a fault for each contradiction.

    With `save_embedding_layers` PEFT writes a fully trained table (one of `saved`) as it trained
    (modules_to_save), as it was (original_module, here base_layer) and once more; other programs
    write the adapter's name, "default".
    """
    kept: dict[str, Tensor] = {}
    faults = []
    for key, tensor in tensors.items():
        name = _ADAPTER_NAME.sub(r"\1.", key)
        for module in saved:
            start = f"{PREFIX}{module}."
            name = name.replace(f"{start}modules_to_save.", start)
            name = name.replace(f"{start}original_module.", f"{start}base_layer.")
        before = kept.setdefault(name, tensor)
        if before.shape != tensor.shape or not torch.equal(before, tensor):
            faults.append(f"{name} is there twice, and its values differ: {key} is one of them")
    return kept, faults


def expected_tensors(
    model: nn.Module, config: LoRAConfig, ids: TokenIds, rows: FileRows
) -> dict[str, Tensor]:
    """Return, on the meta device, the tensors that the file should hold for `model`.

    Token tables count with the rows they will have.
    """
    expected: dict[str, Tensor] = {}
    for name in config.targets:
        layer = model.get_submodule(name)
        rank = config.rank_pattern.get(name, config.rank)
        outputs, inputs = linear_shape(layer)
        outputs = rows.of(name, outputs)
        own = layer.lora_A if isinstance(layer, LoRALayer) else cast(Tensor, layer.weight)
        for key, shape in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))):
            wide = torch.float64 if own.dtype is torch.float64 else torch.float32
            meta = torch.empty(shape, dtype=wide, device="meta")
            expected[f"{PREFIX}{name}.{key}.weight"] = meta
    for name in config.modules_to_save:
        for key, tensor in model.get_submodule(name).state_dict().items():
            meta = tensor.to("meta")
            if key == "weight" and rows.of(name, len(meta)) != len(meta):
                meta = meta.new_empty(rows.needed, *meta.shape[1:])
            expected[f"{PREFIX}{name}.{key}"] = _file_layout(model, f"{name}.{key}", meta)
    token_rows = expected_token_tensors(model, ids)
    return expected | {PREFIX + name: meta for name, meta in token_rows.items()}


def widened(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `expected` in the dtypes of `tensors` where these are wider."""
    kinds = {n: t.dtype for n, t in tensors.items() if t.dtype in _DTYPES}
    return {
        name: meta.to(torch.promote_types(meta.dtype, kinds.get(name, meta.dtype)))
        for name, meta in expected.items()
    }


def take_saved_modules(model: nn.Module, tensors: dict[str, Tensor]) -> set[str]:
    """Changes `model` in place: parameters of fully trained modules become the file's tensors.

    They are not copied, and so not for training. Returns their names in the file.
    """
    taken = set()
    for name in applied_lora(model).originals:
        module = model.get_submodule(name)
        for key, _ in list(module.named_parameters()):
            owner, _, leaf = key.rpartition(".")
            value = _file_layout(model, f"{name}.{key}", tensors[f"{PREFIX}{name}.{key}"])
            parameter = nn.Parameter(value, requires_grad=False)
            module.get_submodule(owner).register_parameter(leaf, parameter)
            taken.add(f"{PREFIX}{name}.{key}")
    return taken


def _file_layout(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Return the parameter `name` of `model`, or its transposed view, as PEFT's file has it."""
    transposed = isinstance(model, LanguageModel) and model.config.is_transposed_in_files(name)
    return tensor.T if transposed else tensor


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """Return (O, I) of a linear, adapted or not."""
    if isinstance(layer, LoRALayer | QuantisedWeight):
        return layer.out_features, layer.in_features
    outputs, inputs = cast(Tensor, layer.weight).shape
    return (inputs, outputs) if is_conv1d(layer) else (outputs, inputs)


def without_base_copies(
    model: nn.Module, expected: dict[str, Tensor], tensors: dict[str, Tensor], rows: FileRows
) -> tuple[dict[str, Tensor], list[str]]:
    """Return `tensors` without copies of the base's weights, and a fault for copies that differ.

    PEFT writes the embedding and the head into the file whenever one of them is adapted.
    """
    own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    applied = applied_lora(model) if lora_layers(model) else None
    if rows.tables is not None:  # as the base has them, if an adapter made them grow
        for name, table in rows.tables.by_name.items():
            table = applied.originals.get(name, table) if applied is not None else table
            own[f"{name}.weight"] = cast(Tensor, table.weight)[: rows.base]
    kept, faults = {}, []
    for key, tensor in tensors.items():
        base = own.get(key.removeprefix(PREFIX).replace(".base_layer.", "."))
        is_copy = key.startswith(PREFIX) and key not in expected
        if not is_copy or base is None or base.shape != tensor.shape:
            kept[key] = tensor
        elif not _same_values(tensor, base):
            faults.append(f"{key} is a weight of the base, and its values differ from this base's")
    return kept, faults


def _same_values(copy: Tensor, base: Tensor) -> bool:
    """Whether both are equal in the coarser of their dtypes: the copy may be of a bf16 base."""
    copy = copy.to(base.device)
    coarse = copy.dtype if copy.dtype.itemsize < base.dtype.itemsize else base.dtype
    return torch.equal(copy.to(coarse), base.to(coarse))


def check_tensors(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    """Return a fault for each tensor that is missing, misshapen, not finite or of another model."""
    renamed = _other_prefix(expected, tensors)
    if renamed is not None:
        return [renamed]
    faults = [f"missing: {n} {tuple(t.shape)}" for n, t in expected.items() if n not in tensors]
    faults += [f"not of this model: {n}" for n in tensors if n not in expected]
    for name in expected.keys() & tensors.keys():
        tensor, wanted = tensors[name], expected[name]
        if tensor.shape != wanted.shape:
            faults.append(f"{name} has shape {_shape(tensor)}, the model needs {_shape(wanted)}")
        elif tensor.dtype not in _DTYPES and tensor.dtype != wanted.dtype:
            faults.append(f"{name} is {tensor.dtype}, allowed are fp32, bf16, fp16 and fp64")
        elif not is_finite(tensor, wanted.dtype):
            faults.append(f"{name} has values that are not finite in {wanted.dtype}")
    return sorted(faults)


def _other_prefix(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> str | None:
    """Return a fault if all names are as expected behind a beginning of their own."""
    if not tensors or len(tensors) != len(expected) or tensors.keys() == expected.keys():
        return None
    seen, wanted = min(tensors), min(expected)
    same = os.path.commonprefix([seen[::-1], wanted[::-1]])[::-1]  # noqa: RUF071
    seen_start, wanted_start = seen.removesuffix(same), wanted.removesuffix(same)
    if {seen_start + name.removeprefix(wanted_start) for name in expected} != tensors.keys():
        return None
    return (
        f"its tensors' names begin with {seen_start!r} where PEFT's begin with {wanted_start!r} "
        f"for this model: {seen}. Rename them if it is the same model under another name"
    )


def is_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether no value is NaN or infinite, also when it is cast to `dtype`."""
    if not tensor.is_floating_point():
        return True
    rows = max(1, _CHECKED_VALUES // max(1, tensor[:1].numel())) if tensor.dim() else 1
    parts = tensor.split(rows) if tensor.dim() else (tensor,)  # the check copies what it checks
    return all(bool(torch.isfinite(part.to(dtype or part.dtype)).all()) for part in parts)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
