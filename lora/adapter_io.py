"""Adapters on disk in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

The one place that knows PEFT's names of tensors. Loading is strict: every name, shape and setting
is checked, and all faults come in one error, before the model is touched.
"""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lora.adapter_config import CONFIG_FILE, describe_adapter, read_description
from lora.apply import AppliedLoRA, applied_lora, apply_lora, lora_layers, remove_lora
from lora.config import LoRAConfig
from lora.errors import AdapterError, did_you_mean, gather
from lora.fingerprint import base_fingerprint
from lora.lora_module import LoRALayer
from lora.runs import atomic_write
from lora.variants import is_conv1d

TENSORS_FILE = "adapter_model.safetensors"
FINGERPRINT_KEY = "lora_lm_base_fingerprint"
_PREFIX = "base_model.model."

log = logging.getLogger(__name__)


def save_adapter(model: nn.Module, folder: Path | str, *, base_name: str | None = None) -> None:
    """Write the adapter that is on `model`: A and B of every layer, and what trained whole.

    Each file is written at once or not at all, the tensors first: a failed save leaves a former
    adapter as it was. `base_name` is what PEFT should load as the base.
    """
    folder, applied = Path(folder), applied_lora(model)
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in _adapter_tensors(model, applied).items()
    }
    metadata = {"format": "pt", FINGERPRINT_KEY: base_fingerprint(model)}
    described = json.dumps(describe_adapter(model, applied, base_name), indent=2, sort_keys=True)
    _make_folder(folder)
    atomic_write(folder / TENSORS_FILE, save(tensors, metadata))
    atomic_write(folder / CONFIG_FILE, (described + "\n").encode())


def load_adapter(model: nn.Module, folder: Path | str, *, trainable: bool = False) -> nn.Module:
    """Changes `model` in place: put the adapter in `folder` on it. Returns `model`.

    A model without LoRA is wrapped as the adapter says; one with LoRA must have the same layers
    and ranks, and is filled. `trainable` leaves A, B and what trains whole ready for training.

    Raises AdapterError that names every fault: another base (by its fingerprint), missing, extra
    or misshapen tensors, settings that change the result and that lora does not honour. `model` is
    then as it was. An adapter without a fingerprint loads, and a log line says so.
    """
    folder = Path(folder)
    described = read_json_object(folder)
    config, faults = read_description(described, _plain_view(model))
    metadata, tensors, tensor_faults = _read_tensors(folder / TENSORS_FILE)
    faults += tensor_faults
    faults += _check_fingerprint(metadata, model, folder)
    if config is not None and tensors:
        faults += _check_tensors(_expected_shapes(model, config), tensors)
    if config is None or faults:
        advice = "Load it onto the base it was trained on, with all of its files as they were."
        raise AdapterError(gather(faults, f"The adapter {folder} does not fit:", advice))
    if lora_layers(model):
        _check_same_layers(model, config, folder)
    else:
        apply_lora(model, config)
    _fill(model, tensors)
    if not trainable:
        model.requires_grad_(False)
    return model


def read_json_object(folder: Path) -> dict[str, Any]:
    """Return `adapter_config.json` of `folder`. Raises AdapterError if it is missing or broken."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        near = ""
        if folder.parent.is_dir() and not folder.is_dir():
            near = did_you_mean(folder.name, (p.name for p in folder.parent.iterdir()))
        seen = "has no adapter_config.json" if folder.is_dir() else "is no folder"
        raise AdapterError(
            f"An adapter was asked for from {folder}, which {seen}.{near} "
            "Name a folder with adapter_config.json and adapter_model.safetensors."
        )
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is no JSON: {error}. Copy the adapter again.") from None
    if not isinstance(described, dict):
        raise AdapterError(f"{path} holds a {type(described).__name__}: it must be an object.")
    return described


def _adapter_tensors(model: nn.Module, applied: AppliedLoRA) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_layers(model).items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B
    for name in applied.originals:
        for key, parameter in model.get_submodule(name).named_parameters():
            tensors[f"{_PREFIX}{name}.{key}"] = parameter
    return tensors


def _expected_shapes(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name in config.targets:
        rank = config.rank_pattern.get(name, config.rank)
        outputs, inputs = _linear_shape(model.get_submodule(name))
        shapes[f"{_PREFIX}{name}.lora_A.weight"] = (rank, inputs)
        shapes[f"{_PREFIX}{name}.lora_B.weight"] = (outputs, rank)
    for name in config.modules_to_save:
        for key, parameter in model.get_submodule(name).named_parameters():
            shapes[f"{_PREFIX}{name}.{key}"] = tuple(parameter.shape)
    return shapes


def _linear_shape(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, LoRALayer):
        return layer.out_features, layer.in_features
    outputs, inputs = layer.weight.shape  # type: ignore[union-attr,misc]
    return (inputs, outputs) if is_conv1d(layer) else (outputs, inputs)  # type: ignore[return-value]


def _read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor], list[str]]:
    if not path.is_file():
        binary = path.with_name("adapter_model.bin")
        if binary.is_file():
            why = (
                "is a pickle, which can run code when it is read; save it with PEFT as safetensors"
            )
            return {}, {}, [f"{binary.name} {why}"]
        return {}, {}, [f"{path.name} is missing"]
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, tensors, []
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        return {}, {}, [f"{path.name} is damaged: {error}"]


def _check_fingerprint(metadata: dict[str, str], model: nn.Module, folder: Path) -> list[str]:
    expected = metadata.get(FINGERPRINT_KEY)
    if expected is None:
        if metadata:
            log.info("%s names no base fingerprint: the base could not be checked", folder)
        return []
    seen = base_fingerprint(model)
    if seen == expected:
        return []
    return [f"it was trained on a base with fingerprint {expected}, and this one has {seen}"]


def _check_tensors(shapes: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> list[str]:
    faults = [f"missing: {name} {shape}" for name, shape in shapes.items() if name not in tensors]
    faults += [f"not of this model: {name}" for name in tensors if name not in shapes]
    for name, tensor in tensors.items():
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            faults.append(f"{name} has shape {tuple(tensor.shape)}, wanted {shapes[name]}")
        elif not tensor.dtype.is_floating_point:
            faults.append(f"{name} is {tensor.dtype}, wanted a floating-point type")
        elif not torch.isfinite(tensor).all():
            faults.append(f"{name} has values that are not finite")
    return faults


def _check_same_layers(model: nn.Module, config: LoRAConfig, folder: Path) -> None:
    applied, layers = applied_lora(model), lora_layers(model)
    faults = []
    if set(config.targets) != set(layers) or set(config.modules_to_save) != set(applied.originals):
        faults.append("it adapts other layers than the LoRA that is on the model")
    else:
        wanted = {name: _scaling(config, name) for name in layers}
        faults = [
            f"{name}: scaling {wanted[name]:g}, on the model {layer.scaling:g}"
            for name, layer in layers.items()
            if wanted[name] != layer.scaling
        ]
    if faults:
        advice = "Take the model's own LoRA off first (remove_lora), or use the adapter's settings."
        raise AdapterError(gather(faults, f"The adapter {folder} does not fit:", advice))


def _scaling(config: LoRAConfig, name: str) -> float:
    rank = config.rank_pattern.get(name, config.rank)
    alpha = config.alpha_pattern.get(name, config.alpha)
    return alpha / (rank**0.5 if config.rslora else rank)


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, parameter in _adapter_tensors(model, applied_lora(model)).items():
        parameter.copy_(tensors[name])


def _plain_view(model: nn.Module) -> nn.Module:
    """Return `model`, or, if it has LoRA, a shell of it with plain layers to look names up in."""
    if not lora_layers(model):
        return model
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}  # shares every tensor
    memo |= {id(b): b for b in model.buffers()}
    return remove_lora(copy.deepcopy(model, memo))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdapterError(
            f"The adapter could not be saved to {folder}: {error.strerror}. Choose another folder."
        ) from error
