"""Adapters on disk in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

The one place that knows PEFT's names of tensors. Loading is strict: every name, shape and setting
is checked, and all faults come in one error, before the model is touched.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from lora.adapters.apply import (
    applied_lora,
    apply_lora,
    lora_layers,
    train_token_rows,
    trained_parameters,
)
from lora.adapters.fingerprint import base_fingerprint
from lora.adapters.peft_config import (
    build_config,
    describe_adapter,
    parse_description,
    read_description,
)
from lora.adapters.peft_files import AdapterFiles, read_adapter_files, write_adapter_files
from lora.adapters.peft_tokens import (
    FIELD,
    Rows,
    describe_rows,
    expected_rows,
    fill_new_rows,
    find_rows,
    row_tensors,
    split_copies,
)
from lora.config import LoRAConfig
from lora.errors import AdapterError, gather
from lora.layers.conv1d import is_conv1d
from lora.lora_module import LoRALayer

FINGERPRINT_KEY = "lora_lm_base_fingerprint"
_PREFIX = "base_model.model."
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ADVICE = "Load it onto the base it was trained on, with both of its files as they were saved."

log = logging.getLogger(__name__)


def save_adapter(model: nn.Module, folder: Path | str, *, base_name: str | None = None) -> None:
    """Write the adapter that is on `model`: A and B, what trained whole, and rows of tokens.

    Both files are complete on the disk before they take the place of a former adapter's, so a
    failed save leaves that as it was. `base_name` is the base that PEFT should load.

    Raises AdapterError for values that are not finite, and CheckpointError if the disk refuses.
    """
    folder, applied = Path(folder), applied_lora(model)
    described = describe_adapter(model, applied, base_name) | describe_rows(model, applied)
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in _adapter_tensors(model).items()
    }
    faults = [f"{name} has values that are not finite" for name, t in tensors.items() if _bad(t)]
    if faults:
        advice = "Nothing was written. Go back to a checkpoint from before the loss went wrong."
        raise AdapterError(gather(faults, f"An adapter was to be saved to {folder}:", advice))
    metadata = {"format": "pt", FINGERPRINT_KEY: base_fingerprint(model)}
    write_adapter_files(folder, described, tensors, metadata)


def load_adapter(model: nn.Module, folder: Path | str, *, trainable: bool = False) -> nn.Module:
    """Changes `model` in place: put the adapter in `folder` on it. Returns `model`.

    A model without LoRA is wrapped as the adapter says; one with LoRA must have the same layers,
    ranks and scalings, and is filled. With `trainable` A, B and what trains whole are ready for
    training; everything else is frozen either way. Values take the model's own dtype. A vocabulary
    that is too small for the adapter's tokens grows, and a log line says so.

    Raises AdapterError that names every fault: another base (by its fingerprint), missing, extra
    or misshapen tensors, settings that change the result and that lora does not honour. `model` is
    then as it was. An adapter without a fingerprint loads, and a log line says so.
    """
    files = read_adapter_files(Path(folder))
    config, faults = read_description(files.described, model)
    faults = files.faults + faults + _check_fingerprint(files, model)
    tensors, rows, fills = files.tensors, cast(Rows, {}), cast(dict[str, Tensor], {})
    if config is not None and not files.faults:
        rows, wrong = find_rows(model, files.described.get(FIELD), config)
        tensors, fills = _split_copies(model, rows, tensors)
        expected = _expected_tensors(model, config, rows)
        tensors, changed = _without_base_copies(model, expected, tensors)
        faults += _check_ranks(model, config) + wrong + changed + _check_tensors(expected, tensors)
        faults += _check_same_layers(model, config, rows) if lora_layers(model) else []
    if config is None or faults:
        raise AdapterError(gather(faults, f"The adapter {folder} does not fit:", _ADVICE))
    if not lora_layers(model):
        # With a seed, torch's global generator is left alone: A's first values go at once.
        apply_lora(model, replace(config, init_seed=0))
        applied_lora(model).config = config
        _add_rows(model, rows, files.folder)
    fill_new_rows(model, fills)
    model.requires_grad_(False)
    with torch.no_grad():
        for name, tensor in _adapter_tensors(model).items():
            tensor.copy_(tensors[name])
    for parameter in trained_parameters(model):
        parameter.requires_grad_(trainable)
    return model


def read_adapter_config(folder: Path | str) -> LoRAConfig:
    """Return the settings of the adapter in `folder`, its layers by full name.

    Raises AdapterError for damaged files and for settings that lora does not honour.
    """
    files = read_adapter_files(Path(folder))
    description, faults = parse_description(files.described)
    names, ending = [], ".lora_A.weight"
    for key in files.tensors:
        if key.startswith(_PREFIX) and key.endswith(ending):
            names.append(key.removeprefix(_PREFIX).removesuffix(ending))
    faults = files.faults + faults
    if not names and not files.faults:
        faults.append(f"no tensor is called {_PREFIX}…{ending}")
    if description is None or faults:
        raise AdapterError(gather(faults, f"The adapter {folder} cannot be used:", _ADVICE))
    return build_config(description, names, list(description.saved))


def _adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_layers(model).items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B
    for name in applied_lora(model).originals:
        for key, tensor in model.get_submodule(name).state_dict().items():
            tensors[f"{_PREFIX}{name}.{key}"] = tensor
    rows = row_tensors(applied_lora(model))
    return tensors | {_PREFIX + name: tensor for name, tensor in rows.items()}


def _add_rows(model: nn.Module, rows: Rows, folder: Path) -> None:
    if not rows:
        return
    train_token_rows(model, rows)
    layer = next(iter(applied_lora(model).trainable_tokens.values()))
    if len(layer.weight) > layer.base_rows:
        words = "%s has tokens of its own: the vocabulary grows from %d to %d"
        log.warning(words, folder, layer.base_rows, len(layer.weight))


def _split_copies(
    model: nn.Module, rows: Rows, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    inside = {k.removeprefix(_PREFIX): t for k, t in tensors.items() if k.startswith(_PREFIX)}
    outside = {k: t for k, t in tensors.items() if not k.startswith(_PREFIX)}
    kept, fills = split_copies(model, rows, inside)
    return {_PREFIX + name: tensor for name, tensor in kept.items()} | outside, fills


def _expected_tensors(model: nn.Module, config: LoRAConfig, rows: Rows) -> dict[str, Tensor]:
    """Return, on the meta device, what the file should hold: names, shapes, types on `model`."""
    expected: dict[str, Tensor] = {}
    for name in config.targets:
        layer = model.get_submodule(name)
        rank = config.rank_pattern.get(name, config.rank)
        outputs, inputs = _linear_shape(layer)
        own = layer.lora_A if isinstance(layer, LoRALayer) else cast(Tensor, layer.weight)
        for key, shape in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))):
            wide = torch.float64 if own.dtype is torch.float64 else torch.float32
            meta = torch.empty(shape, dtype=wide, device="meta")
            expected[f"{_PREFIX}{name}.{key}.weight"] = meta
    for name in config.modules_to_save:
        for key, tensor in model.get_submodule(name).state_dict().items():
            expected[f"{_PREFIX}{name}.{key}"] = tensor.to("meta")
    return expected | {_PREFIX + name: meta for name, meta in expected_rows(model, rows).items()}


def _linear_shape(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, LoRALayer):
        return layer.out_features, layer.in_features
    outputs, inputs = cast(Tensor, layer.weight).shape
    return (inputs, outputs) if is_conv1d(layer) else (outputs, inputs)


def _without_base_copies(
    model: nn.Module, expected: dict[str, Tensor], tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return `tensors` without copies of the base's own values, and those copies that differ.

    PEFT writes the embedding and the head beside an adapter whenever one of them is adapted.
    """
    own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for name, layer in applied_lora(model).trainable_tokens.items() if lora_layers(model) else ():
        own[f"{name}.weight"] = layer.weight[: layer.base_rows]
    kept, faults = {}, []
    for key, tensor in tensors.items():
        base = own.get(key.removeprefix(_PREFIX).replace(".base_layer.", "."))
        if key in expected or base is None or base.shape != tensor.shape:
            kept[key] = tensor
        elif not torch.equal(tensor.to(base.device, base.dtype), base):
            faults.append(f"{key} is a weight of the base, with other values than here")
    return kept, faults


def _check_fingerprint(files: AdapterFiles, model: nn.Module) -> list[str]:
    trained_on = files.metadata.get(FINGERPRINT_KEY)
    if files.faults:
        return []
    if trained_on is None:
        log.warning("%s names no base fingerprint: the base could not be checked", files.folder)
        return []
    seen = base_fingerprint(model)
    name = files.described.get("base_model_name_or_path")
    called = f" ({name})" if name else ""
    fault = f"it was made for a base{called} with fingerprint {trained_on}, this one has {seen}"
    return [] if seen == trained_on else [fault]


def _check_tensors(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    faults = [f"missing: {n} {tuple(t.shape)}" for n, t in expected.items() if n not in tensors]
    faults += [f"not of this model: {n}" for n in tensors if n not in expected]
    for name in expected.keys() & tensors.keys():
        tensor, wanted = tensors[name], expected[name]
        if tensor.shape != wanted.shape:
            faults.append(f"{name} has shape {_shape(tensor)}, the model wants {_shape(wanted)}")
        elif tensor.dtype not in _DTYPES and tensor.dtype != wanted.dtype:
            faults.append(f"{name} is {tensor.dtype}, allowed are fp32, bf16, fp16 and fp64")
        elif _bad(tensor.to(wanted.dtype)):
            faults.append(f"{name} has values that are not finite in {wanted.dtype}")
    return sorted(faults)


def _check_ranks(model: nn.Module, config: LoRAConfig) -> list[str]:
    faults = []
    for name in config.targets:
        rank = config.rank_pattern.get(name, config.rank)
        most = min(_linear_shape(model.get_submodule(name)))
        if rank > most:
            faults.append(f"{name}: rank {rank}, and the layer's smaller side has {most}")
    return faults


def _check_same_layers(model: nn.Module, config: LoRAConfig, rows: Rows) -> list[str]:
    layers, saved = lora_layers(model), set(applied_lora(model).originals)
    wanted = set(config.targets)
    faults = [f"adapted on the model, not in the file: {n}" for n in layers.keys() - wanted]
    faults += [f"in the file, not adapted on the model: {n}" for n in wanted - layers.keys()]
    faults += [f"trained whole on one side only: {n}" for n in saved ^ set(config.modules_to_save)]
    here = {name: layer.ids for name, layer in applied_lora(model).trainable_tokens.items()}
    for name in here.keys() | rows.keys():
        if here.get(name) != rows.get(name):
            seen = (
                f"{list(rows.get(name, ()))} in the file, {list(here.get(name, ()))} on the model"
            )
            faults.append(f"trained rows of {name}: {seen}")
    for name in layers.keys() & wanted:
        rank = config.rank_pattern.get(name, config.rank)
        alpha = config.alpha_pattern.get(name, config.alpha)
        scaling, layer = alpha / (math.sqrt(rank) if config.rslora else rank), layers[name]
        if rank != layer.rank or not math.isclose(scaling, layer.scaling):
            own = f"rank {layer.rank} and scaling {layer.scaling:g} on the model"
            faults.append(f"{name}: rank {rank} and scaling {scaling:g} in the file, {own}")
    return sorted(faults)


def _bad(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
