"""A base model's fingerprint: names, shapes and a sample of its values, whatever LoRA does to it.

The sample is rounded to bf16 first, so the same weights loaded as fp32 and as bf16 agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lora.apply import AppliedLoRA
from lora.errors import ModelError
from lora.lora_module import LoRALayer
from lora.variants import LoRAConv1D, is_conv1d

SAMPLES_PER_TENSOR = 64


@torch.no_grad()
def base_fingerprint(model: nn.Module) -> str:
    """Return 32 hexadecimal digits that tell this base from others.

    LoRA's own tensors are left out, modules that train whole count as they were, a tensor shared
    by two names counts once, and Conv1D's weights as (O, I). Raises ModelError for a model without
    values (on the meta device).
    """
    digest = hashlib.sha256()
    samples = []
    for name, tensor in sorted(_base_tensors(model), key=lambda item: item[0]):
        if tensor.is_meta:
            raise ModelError(f"{name} has no values yet (meta device): load the weights first.")
        digest.update(f"{name}{tuple(tensor.shape)};".encode())
        count = min(SAMPLES_PER_TENSOR, tensor.numel())
        places = torch.linspace(0, max(0, tensor.numel() - 1), count).long()
        samples.append(_pick(tensor, places.to(tensor.device)).to(torch.bfloat16).view(torch.int16))
    if samples:
        digest.update(torch.cat(samples).cpu().numpy().tobytes())  # one transfer from a GPU
    return digest.hexdigest()[:32]


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    applied = vars(model).get("applied_lora")
    originals = applied.originals if isinstance(applied, AppliedLoRA) else {}
    seen: set[int] = set()
    for module_name, module in model.named_modules(remove_duplicate=False):
        owner = originals.get(module_name, module)
        for key, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            own = isinstance(module, LoRALayer) and key in ("lora_A", "lora_B")
            if own or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            transposed = isinstance(module, LoRAConv1D) or is_conv1d(module)
            value = parameter.T if transposed and key == "weight" else parameter
            yield f"{module_name}.{key}" if module_name else key, value


def _pick(tensor: Tensor, places: Tensor) -> Tensor:
    if tensor.is_contiguous():
        return tensor.view(-1)[places]
    rows = torch.div(places, tensor.shape[-1], rounding_mode="floor")  # a transposed matrix
    return tensor[rows, places % tensor.shape[-1]]
