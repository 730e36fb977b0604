"""A merged model written as a Hugging Face directory, in the base's dtypes and with its settings.

report = write_merged(model, ids, base=Path("base"), tokenizer=tokenizer, folder=Path("merged"))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lora.adapters.merge import TOLERANCES, MergeReport, merge_lora
from lora.data.tokenizers.subword import TextTokenizer
from lora.decoder.decoder import Decoder
from lora.errors import AdapterError
from lora.pretrained.hf_weights import read_stored_dtypes, save_decoder
from lora.pretrained.model_files import save_tokenizer_files

MergedDtype = Literal["float32", "bfloat16", "float16"]
_BY_NAME = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class MergedModel:
    """What was written, and how far its logits are from the adapted model's."""

    merge: MergeReport
    dtypes: tuple[str, ...]
    """Dtypes of the file, the most frequent first."""
    relative_error: float
    """‖difference‖ / ‖reference‖ of the logits, rounding to the file's dtypes included."""
    tolerance: float


@torch.no_grad()
def write_merged(
    model: Decoder,
    ids: Tensor,
    *,
    base: Path,
    tokenizer: TextTokenizer,
    folder: Path,
    dtype: MergedDtype | None = None,
) -> MergedModel:
    """Changes `model` (fp32, adapted) in place: merge it, and write it into `folder`.

    Each tensor gets the dtype that it has in the directory `base`, or `dtype`. The logits on `ids`
    (1, T) with the rounded weights are compared with the adapted model's.

    Raises AdapterError if they differ by more than the dtype's tolerance, before anything is
    written.
    """
    before = model(ids).double()
    report = merge_lora(model, ids)
    dtypes = _dtypes_to_write(model, base, dtype)
    _round(model, dtypes)
    error = float((model(ids).double() - before).norm() / before.norm().clamp(min=1e-30))
    tolerance = max(TOLERANCES[kind] for kind in dtypes.values())
    if not error <= tolerance:  # NaN is refused too
        raise AdapterError(
            f"Cannot merge: in the dtypes of the file the logits differ by {error:.2e} "
            f"(‖difference‖ / ‖reference‖), allowed is {tolerance:.2g}. Nothing was written. Use "
            "--dtype float32."
        )
    save_decoder(model, folder, dtypes=dtypes)
    save_tokenizer_files(tokenizer, base, folder)
    kinds = list(dtypes.values())
    by_count = sorted(set(kinds), key=kinds.count, reverse=True)
    names = tuple(str(kind).removeprefix("torch.") for kind in by_count)
    return MergedModel(report, names, error, tolerance)


def _dtypes_to_write(
    model: Decoder, base: Path, dtype: MergedDtype | None
) -> dict[str, torch.dtype]:
    names = [name for name, _ in model.named_parameters()]
    if dtype is not None:
        return dict.fromkeys(names, _BY_NAME[dtype])
    stored = read_stored_dtypes(base)
    kinds = list(stored.values())
    usual = max(set(kinds), key=kinds.count)  # for a head that had no weight of its own before
    return {name: stored.get(name, usual) for name in names}


def _round(model: Decoder, dtypes: Mapping[str, torch.dtype]) -> None:
    for name, parameter in model.named_parameters():
        rounded = parameter.to(dtypes[name])
        if not torch.isfinite(rounded).all():
            raise AdapterError(
                f"Cannot write the merged model: {name} has values beyond {dtypes[name]}. Nothing "
                "was written. Use --dtype float32."
            )
        if rounded.dtype != parameter.dtype:
            parameter.data = rounded.to(parameter.dtype)
