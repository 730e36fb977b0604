"""Save and load adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

The one module that knows PEFT's tensor names. Loading is strict: every name, shape and setting is
checked, and one error lists all faults before the model is changed.
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
    TokenIds,
    describe_trainable_tokens,
    expected_token_tensors,
    fill_new_rows,
    find_trainable_tokens,
    split_copies,
    trainable_token_tensors,
)
from lora.config import LoRAConfig
from lora.errors import AdapterError, gather
from lora.layers.conv1d import is_conv1d
from lora.lora_module import LoRALayer

FINGERPRINT_KEY = "lora_lm_base_fingerprint"
_PREFIX = "base_model.model."
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ADVICE = "Load it onto the base it was trained on, with both files as they were saved."

log = logging.getLogger(__name__)


def save_adapter(model: nn.Module, folder: Path | str, *, base_name: str | None = None) -> None:
    """Write the adapter on `model`: A and B, fully trained modules, and trained embedding rows.

    Both files are complete on disk before they replace a former adapter's, so a failed save leaves
    that as it was. `base_name` is the base that PEFT should load.

    Raises AdapterError for values that are not finite, and CheckpointError if a file cannot be
    written.
    """
    folder, applied = Path(folder), applied_lora(model)
    described = describe_adapter(model, applied, base_name) | describe_trainable_tokens(
        model, applied
    )
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in _adapter_tensors(model).items()
    }
    faults = [f"{n} has values that are not finite" for n, t in tensors.items() if not _finite(t)]
    if faults:
        advice = "Nothing was written. Go back to a checkpoint from before the loss diverged."
        raise AdapterError(gather(faults, f"Cannot save the adapter to {folder}:", advice))
    metadata = {"format": "pt", FINGERPRINT_KEY: base_fingerprint(model)}
    write_adapter_files(folder, described, tensors, metadata)


def load_adapter(model: nn.Module, folder: Path | str, *, trainable: bool = False) -> nn.Module:
    """Changes `model` in place: load the adapter in `folder` onto it. Returns `model`.

    A model without LoRA is wrapped as the adapter's config says; one with LoRA must have the same
    layers, ranks and scalings, and its values are overwritten. With `trainable`, what the adapter
    trained can train again; everything else is frozen either way. Values are cast to the model's
    dtypes. A vocabulary too small for the adapter's tokens grows, with a warning in the log.

    Raises AdapterError that lists every fault: another base (by its fingerprint), missing, extra
    or misshapen tensors, and settings that change the result and are not supported. `model` is then
    unchanged. An adapter without a fingerprint loads, with a warning in the log.
    """
    files = read_adapter_files(Path(folder))
    config, faults = read_description(files.described, model)
    faults = files.faults + faults + _check_fingerprint(files, model)
    tensors, ids, fills = files.tensors, cast(TokenIds, {}), cast(dict[str, Tensor], {})
    if config is not None and not files.faults:
        ids, wrong = find_trainable_tokens(model, files.described.get(FIELD), config)
        tensors, fills = _split_copies(model, ids, tensors)
        expected = _expected_tensors(model, config, ids)
        tensors, changed = _without_base_copies(model, expected, tensors)
        faults += _check_ranks(model, config) + wrong + changed + _check_tensors(expected, tensors)
        faults += _check_same_layers(model, config, ids) if lora_layers(model) else []
    if config is None or faults:
        raise AdapterError(gather(faults, f"Cannot load the adapter {folder}:", _ADVICE))
    if not lora_layers(model):
        # A fixed seed, so that drawing A (overwritten below) leaves torch's global generator alone.
        apply_lora(model, replace(config, init_seed=0))
        applied_lora(model).config = config
        _train_tokens(model, ids, files.folder)
    fill_new_rows(model, fills)
    model.requires_grad_(False)
    with torch.no_grad():
        for name, tensor in _adapter_tensors(model).items():
            tensor.copy_(tensors[name])
    for parameter in trained_parameters(model):
        parameter.requires_grad_(trainable)
    return model


def read_adapter_config(folder: Path | str) -> LoRAConfig:
    """Return the LoRAConfig of the adapter in `folder`, its layers by full name.

    Raises AdapterError for damaged files and for settings that are not supported.
    """
    files = read_adapter_files(Path(folder))
    description, faults = parse_description(files.described)
    names, ending = [], ".lora_A.weight"
    for key in files.tensors:
        if key.startswith(_PREFIX) and key.endswith(ending):
            names.append(key.removeprefix(_PREFIX).removesuffix(ending))
    faults = files.faults + faults
    if not names and not files.faults:
        faults.append(f"no tensor has a name {_PREFIX}…{ending}")
    if description is None or faults:
        raise AdapterError(gather(faults, f"Cannot use the adapter {folder}:", _ADVICE))
    return build_config(description, names, list(description.saved))


def _adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_layers(model).items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B
    for name in applied_lora(model).originals:
        for key, tensor in model.get_submodule(name).state_dict().items():
            tensors[f"{_PREFIX}{name}.{key}"] = tensor
    token_rows = trainable_token_tensors(applied_lora(model))
    return tensors | {_PREFIX + name: tensor for name, tensor in token_rows.items()}


def _train_tokens(model: nn.Module, ids: TokenIds, folder: Path) -> None:
    if not ids:
        return
    train_token_rows(model, ids)
    layer = next(iter(applied_lora(model).trainable_tokens.values()))
    if len(layer.weight) > layer.base_rows:
        words = "%s adds tokens: the vocabulary grows from %d to %d"
        log.warning(words, folder, layer.base_rows, len(layer.weight))


def _split_copies(
    model: nn.Module, ids: TokenIds, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    inside = {k.removeprefix(_PREFIX): t for k, t in tensors.items() if k.startswith(_PREFIX)}
    outside = {k: t for k, t in tensors.items() if not k.startswith(_PREFIX)}
    kept, fills = split_copies(model, ids, inside)
    return {_PREFIX + name: tensor for name, tensor in kept.items()} | outside, fills


def _expected_tensors(model: nn.Module, config: LoRAConfig, ids: TokenIds) -> dict[str, Tensor]:
    """Return, on the meta device, the tensors that the file should hold for `model`."""
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
    token_rows = expected_token_tensors(model, ids)
    return expected | {_PREFIX + name: meta for name, meta in token_rows.items()}


def _linear_shape(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, LoRALayer):
        return layer.out_features, layer.in_features
    outputs, inputs = cast(Tensor, layer.weight).shape
    return (inputs, outputs) if is_conv1d(layer) else (outputs, inputs)


def _without_base_copies(
    model: nn.Module, expected: dict[str, Tensor], tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return `tensors` without copies of the base's weights, and a fault for copies that differ.

    PEFT writes the embedding and the head into the file whenever one of them is adapted.
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
            faults.append(f"{key} is a weight of the base, and its values differ from this base's")
    return kept, faults


def _check_fingerprint(files: AdapterFiles, model: nn.Module) -> list[str]:
    trained_on = files.metadata.get(FINGERPRINT_KEY)
    if files.faults:
        return []
    if trained_on is None:
        log.warning("%s has no base fingerprint: the base could not be checked", files.folder)
        return []
    seen = base_fingerprint(model)
    name = files.described.get("base_model_name_or_path")
    called = f" ({name})" if name else ""
    fault = f"it was trained on a base{called} with fingerprint {trained_on}, this one has {seen}"
    return [] if seen == trained_on else [fault]


def _check_tensors(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    faults = [f"missing: {n} {tuple(t.shape)}" for n, t in expected.items() if n not in tensors]
    faults += [f"not of this model: {n}" for n in tensors if n not in expected]
    for name in expected.keys() & tensors.keys():
        tensor, wanted = tensors[name], expected[name]
        if tensor.shape != wanted.shape:
            faults.append(f"{name} has shape {_shape(tensor)}, the model needs {_shape(wanted)}")
        elif tensor.dtype not in _DTYPES and tensor.dtype != wanted.dtype:
            faults.append(f"{name} is {tensor.dtype}, allowed are fp32, bf16, fp16 and fp64")
        elif not _finite(tensor.to(wanted.dtype)):
            faults.append(f"{name} has values that are not finite in {wanted.dtype}")
    return sorted(faults)


def _check_ranks(model: nn.Module, config: LoRAConfig) -> list[str]:
    faults = []
    for name in config.targets:
        rank = config.rank_pattern.get(name, config.rank)
        highest = min(_linear_shape(model.get_submodule(name)))
        if rank > highest:
            faults.append(f"{name}: rank {rank}, allowed is at most {highest}, its smaller side")
    return faults


def _check_same_layers(model: nn.Module, config: LoRAConfig, ids: TokenIds) -> list[str]:
    layers, saved = lora_layers(model), set(applied_lora(model).originals)
    wanted = set(config.targets)
    faults = [f"adapted on the model, not in the file: {n}" for n in layers.keys() - wanted]
    faults += [f"in the file, not adapted on the model: {n}" for n in wanted - layers.keys()]
    in_file = set(config.modules_to_save)
    faults += [f"fully trained on the model, not in the file: {n}" for n in saved - in_file]
    faults += [f"fully trained in the file, not on the model: {n}" for n in in_file - saved]
    here = {name: layer.ids for name, layer in applied_lora(model).trainable_tokens.items()}
    for name in here.keys() | ids.keys():
        if here.get(name) != ids.get(name):
            seen = f"{list(ids.get(name, ()))} in the file, {list(here.get(name, ()))} on the model"
            faults.append(f"trainable tokens of {name}: {seen}")
    for name in layers.keys() & wanted:
        rank = config.rank_pattern.get(name, config.rank)
        alpha = config.alpha_pattern.get(name, config.alpha)
        scaling, layer = alpha / (math.sqrt(rank) if config.rslora else rank), layers[name]
        if rank != layer.rank or not math.isclose(scaling, layer.scaling):
            own = f"rank {layer.rank} and scaling {layer.scaling:g} on the model"
            faults.append(f"{name}: rank {rank} and scaling {scaling:g} in the file, {own}")
    return sorted(faults)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
