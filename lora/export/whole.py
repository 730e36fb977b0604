"""A merged model of transformers, written as a whole: its code does not run block by block."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from lora.adapters.bases.unpack import unpack_base
from lora.adapters.merge import merge_lora
from lora.decoder.language_model import LanguageModel
from lora.decoder.quantised.base import base_kind
from lora.errors import AdapterError
from lora.pretrained.hf_files import open_tensors
from lora.pretrained.hf_weights import FLOATS
from lora.pretrained.load.models import load_language_model, save_language_model
from lora.pretrained.quantised.folder import find_4bit
from lora.pretrained.transformers_models.save import cast_parameters


def write_whole(
    model: LanguageModel,
    ids: Tensor,
    *,
    base: Path,
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device,
) -> tuple[Tensor, Tensor, list[torch.dtype]]:
    """Changes `model`, which is adapted and fp32, in place: it is merged and written to `folder`.

    Each tensor gets the dtype that it has in the files of `base`, or `dtype`. Returns the logits
    (T, V) of `ids` (1, T) before and of the files afterwards, in fp32, and the dtypes of the files.
    Raises AdapterError if a value is beyond its dtype.
    """
    before = _logits(model.to(device), ids)
    merge_lora(model)
    if base_kind(model) is not None:  # linears without LoRA, in the codes of a folder in 4 bits
        unpack_base(model, torch.float32)
    kind_of = _stored_kinds(base) if dtype is None else lambda name: dtype
    kinds = {name: kind_of(name) for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        rounded(parameter.detach(), kinds[name], name)
    cast_parameters(model, kind_of)
    save_language_model(model, folder)
    written = load_language_model(folder, implementation="transformers", device=device)
    return before, _logits(written, ids), list(kinds.values())


def rounded(weight: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return `weight` in `dtype`. Raises AdapterError if it has values beyond it."""
    stored = weight.to(dtype)
    if not torch.isfinite(stored).all():
        raise AdapterError(
            f"Cannot write the merged model: {name} has values beyond {dtype}. Nothing was "
            "written. Use --dtype float32."
        )
    return stored


@torch.no_grad()
def _logits(model: LanguageModel, ids: Tensor) -> Tensor:
    first = next(model.parameters())
    return model.eval()(ids.to(first.device))[0].float().cpu()  # (T, V)


def _stored_kinds(base: Path) -> Callable[[str], torch.dtype]:
    """Return the dtype of a parameter in the files of `base`; the usual one where names differ."""
    with ExitStack() as files:
        stored = open_tensors(base, files)
        kinds = {n: FLOATS[tensor.dtype] for n, tensor in stored.items() if tensor.dtype in FLOATS}
    found = list(kinds.values())
    # A folder in 4 bits has its weights as codes; its tables of scales are fp32.
    is_4bit = find_4bit(base) is not None
    usual = torch.bfloat16 if is_4bit else max(set(found), key=found.count)
    return lambda name: kinds.get(name, usual)
