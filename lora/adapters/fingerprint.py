"""A base model's fingerprint: names, shapes and a sample of its values, whatever LoRA does to it.

The sample is rounded to bf16 first, so the same weights loaded as fp32 and as bf16 agree; linears
in eight bits kept theirs from before they were rounded, so they agree too.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from lora.adapters.apply import AppliedLoRA
from lora.decoder.quantised import Fp8Weight, sample_values
from lora.errors import ModelError
from lora.layers.conv1d import LoRAConv1D, is_conv1d
from lora.lora_module import LoRALayer


@torch.no_grad()
def base_fingerprint(model: nn.Module) -> str:
    """Return 32 hexadecimal digits that tell this base from others.

    At most 64 evenly spaced values of each parameter are read. LoRA's own tensors are left out,
    modules that train whole count as they were before, token tables as they were before rows were
    added, a tensor with two names counts once, and Conv1D's weights count as (O, I). Buffers do
    not count. Raises ModelError for a model on the meta device.
    """
    tensors = sorted(_base_tensors(model), key=lambda item: item[0])
    digest = hashlib.sha256()
    for name, shape, sample in tensors:
        if sample.is_meta:
            raise ModelError(
                f"A fingerprint was asked of a model whose {name} has no values (meta device). "
                "Load the weights first."
            )
        digest.update(f"{name}{tuple(shape)};".encode())
    for sample in _to_host([sample for _, _, sample in tensors]):
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:32]


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Size, Tensor]]:
    """Yield names, shapes as in a linear, and samples."""
    applied = vars(model).get("applied_lora")
    originals = applied.originals if isinstance(applied, AppliedLoRA) else {}
    rows = applied.trainable_tokens if isinstance(applied, AppliedLoRA) else {}
    seen: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        base = _before_training(name, originals) or module
        transposed = isinstance(base, LoRAConv1D) or is_conv1d(base)
        for key, parameter in base.named_parameters(recurse=False):
            of_lora = isinstance(base, LoRALayer) and key in ("lora_A", "lora_B")
            if of_lora or (name in rows and key == "token_rows") or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            value = parameter.T if transposed and key == "weight" else parameter
            value = value[: rows[name].base_rows] if name in rows else value
            coded = isinstance(base, Fp8Weight) and key == "weight"
            sample = cast(Fp8Weight, base).sample if coded else sample_values(value)
            yield f"{name}.{key}" if name else key, value.shape, sample


def _before_training(name: str, originals: dict[str, nn.Module]) -> nn.Module | None:
    for saved, original in originals.items():
        if name == saved or name.startswith(saved + "."):
            return original.get_submodule(name[len(saved) + 1 :])
    return None


def _to_host(samples: list[Tensor]) -> list[Tensor]:
    by_device: defaultdict[torch.device, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        by_device[sample.device].append(place)
    on_host = list(samples)
    for places in by_device.values():
        joined = torch.cat([samples[p] for p in places]).cpu()  # the host waits once a device
        parts = joined.split([len(samples[p]) for p in places])
        for place, part in zip(places, parts, strict=True):
            on_host[place] = part
    return on_host
