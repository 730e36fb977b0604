"""A base model's fingerprints: hashes of names, shapes and sampled values that ignore LoRA.

The sample is rounded to bf16 first, so the same weights loaded as fp32 and as bf16 agree. Quantised
linears store a sample from before they were rounded, so they agree too; where there were no such
values, and in the second fingerprint, codes stand in their place.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lora.adapters.apply import AppliedLoRA
from lora.adapters.bases.linears import (
    block_linears,
    sample_codes,
    sample_codes_of,
    table_names,
)
from lora.decoder.language_model import LanguageModel
from lora.decoder.quantised.base import QuantisedWeight, sample_values
from lora.decoder.quantised.record import BaseQuantisation
from lora.errors import ModelError
from lora.layers.conv1d import LoRAConv1D, is_conv1d
from lora.layers.token_tables import find_token_tables
from lora.lora_module import LoRALayer

Sample = Callable[[str, nn.Module, Tensor], Tensor]
"""Full name of a module, the module, its weight (O, I) -> a sample of it, int16."""


@torch.no_grad()
def base_fingerprint(model: nn.Module, release: Callable[[], None] | None = None) -> str:
    """Return 32 hexadecimal digits that distinguish this base from others.

    At most 64 evenly spaced values of each parameter are read. LoRA's own tensors are left out,
    fully trained modules count as they were before training, token tables as they were before rows
    were added, a tensor with two names counts once, and Conv1D's weights count as (O, I). Buffers
    do not count, and quantised weights count as before, or as codes where there was no before.
    `release` gives back what was read of a mapped model. A sharded decoder, or one that was
    unpacked, has its own noted. Raises ModelError for a model on the meta device.
    """
    if isinstance(model, LanguageModel) and model.known_fingerprint is not None:
        return model.known_fingerprint

    def sample(name: str, module: nn.Module, value: Tensor) -> Tensor:
        if not isinstance(module, QuantisedWeight):
            return sample_values(value)
        return module.sample if len(module.sample) else sample_codes(module)

    return _fingerprint(model, sample, release)


@torch.no_grad()
def code_fingerprint(
    model: nn.Module,
    kind: BaseQuantisation | None = None,
    release: Callable[[], None] | None = None,
) -> str:
    """Return the fingerprint of the codes of a quantised base; of its other tensors as above.

    Of a base that is not quantised: that of the codes that it would have in this `kind`.
    """
    coded: set[str] = set()
    if kind is not None:
        coded = block_linears(model).keys() - set(kind.kept)
        coded |= set(table_names(model)) if kind.embeddings else set()

    def sample(name: str, module: nn.Module, value: Tensor) -> Tensor:
        if isinstance(module, QuantisedWeight):
            return sample_codes(module)
        if kind is not None and name in coded:
            return sample_codes_of(value, kind, name)
        return sample_values(value)

    return _fingerprint(model, sample, release)


def _fingerprint(model: nn.Module, sample: Sample, release: Callable[[], None] | None) -> str:
    tensors = []
    for tensor in _base_tensors(model, sample):
        tensors.append(tensor)
        if release is not None:
            release()
    tensors.sort(key=lambda item: item[0])
    digest = hashlib.sha256()
    for name, shape, values in tensors:
        if values.is_meta:
            raise ModelError(
                f"Cannot compute the base's fingerprint: {name} has no values (meta device). Load "
                "the weights first."
            )
        digest.update(f"{name}{tuple(shape)};".encode())
    for values in _to_cpu([values for _, _, values in tensors]):
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:32]


def _base_tensors(
    model: nn.Module, sample: Sample
) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Yield the name, the shape in (O, I) order and the sample of each of the base's tensors.

    `sample` is called for the weights of modules, by these modules' names.
    """
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
            is_coded = isinstance(base, QuantisedWeight) and key == "weight"
            shape = (base.out_features, base.in_features) if is_coded else tuple(value.shape)
            taken = sample(name, base, value) if key == "weight" else sample_values(value)
            yield f"{name}.{key}" if name else key, shape, taken


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
