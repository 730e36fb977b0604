"""A base model's fingerprint: a hash of names, shapes and sampled values that ignores LoRA.

The sample is rounded to bf16 first, so the same weights loaded as fp32 and as bf16 agree. Quantised
linears store a sample from before they were rounded, so they agree too.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lora.adapters.apply import AppliedLoRA
from lora.decoder.language_model import LanguageModel
from lora.decoder.quantised.base import QuantisedWeight, sample_values
from lora.errors import ModelError
from lora.layers.conv1d import LoRAConv1D, is_conv1d
from lora.layers.token_tables import find_token_tables
from lora.lora_module import LoRALayer


@torch.no_grad()
def base_fingerprint(model: nn.Module, release: Callable[[], None] | None = None) -> str:
    """Return 32 hexadecimal digits that distinguish this base from others.

    At most 64 evenly spaced values of each parameter are read. LoRA's own tensors are left out,
    fully trained modules count as they were before training, token tables as they were before rows
    were added, a tensor with two names counts once, and Conv1D's weights count as (O, I). Buffers
    do not count. `release` gives back what was read of a mapped model. A sharded decoder has its
    own noted. Raises ModelError for a model on the meta device.
    """
    if isinstance(model, LanguageModel) and model.known_fingerprint is not None:
        return model.known_fingerprint
    tensors = []
    for tensor in _base_tensors(model):
        tensors.append(tensor)
        if release is not None:
            release()
    tensors.sort(key=lambda item: item[0])
    digest = hashlib.sha256()
    for name, shape, sample in tensors:
        if sample.is_meta:
            raise ModelError(
                f"Cannot compute the base's fingerprint: {name} has no values (meta device). Load "
                "the weights first."
            )
        digest.update(f"{name}{tuple(shape)};".encode())
    for sample in _to_cpu([sample for _, _, sample in tensors]):
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:32]


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Size, Tensor]]:
    """Yield the name, the shape in (O, I) order and the sample of each of the base's tensors."""
    applied = vars(model).get("applied_lora")
    originals = applied.originals if isinstance(applied, AppliedLoRA) else {}
    tokens = applied.trainable_tokens if isinstance(applied, AppliedLoRA) else {}
    base_rows = applied.base_vocab_size if isinstance(applied, AppliedLoRA) else None
    tables = {} if base_rows is None else find_token_tables(model).by_name
    seen: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        base = _before_training(name, originals) or module
        transposed = isinstance(base, LoRAConv1D) or is_conv1d(base)
        for key, parameter in base.named_parameters(recurse=False):
            of_lora = isinstance(base, LoRALayer) and key in ("lora_A", "lora_B")
            if of_lora or (name in tokens and key == "token_rows") or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            value = parameter.T if transposed and key == "weight" else parameter
            # All tables grow with one, whichever trains.
            value = value[:base_rows] if name in tables and key == "weight" else value
            shape = value.shape
            if isinstance(base, QuantisedWeight) and key == "weight":
                shape = torch.Size((base.out_features, base.in_features))
                sample = base.sample
            else:
                sample = sample_values(value)
            yield f"{name}.{key}" if name else key, shape, sample


def _before_training(name: str, originals: dict[str, nn.Module]) -> nn.Module | None:
    for saved, original in originals.items():
        if name == saved or name.startswith(saved + "."):
            return original.get_submodule(name[len(saved) + 1 :])
    return None


def _to_cpu(samples: list[Tensor]) -> list[Tensor]:
    """Return `samples` on the CPU, with one copy per device instead of one per tensor."""
    by_device: defaultdict[torch.device, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        by_device[sample.device].append(index)
    on_cpu = list(samples)
    for indices in by_device.values():
        joined = torch.cat([samples[i] for i in indices]).cpu()  # the host waits once per device
        parts = joined.split([len(samples[i]) for i in indices])
        for index, part in zip(indices, parts, strict=True):
            on_cpu[index] = part
    return on_cpu
