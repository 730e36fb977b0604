"""A merged model written as a Hugging Face directory, in the base's dtypes and with its settings.

report = write_merged(mapped, ids, base=Path("base"), tokenizer=tokenizer, folder=Path("merged"))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lora.adapters.apply import lora_layers
from lora.adapters.bases.linears import default_kind
from lora.adapters.bases.messages import measured_change
from lora.adapters.bases.quantisation import quantisation_of
from lora.adapters.bases.unpack import round_base
from lora.adapters.merge import TOLERANCES
from lora.data.tokenizers.subword import TextTokenizer
from lora.decoder.decoder import Decoder
from lora.decoder.quantised.record import BaseQuantisation
from lora.errors import AdapterError, UnsupportedModelError
from lora.export.blockwise import CPU, DecoderBlocks, logits_by_block, logits_error
from lora.export.chosen import AS_STORED, MergedValues
from lora.export.requantised import RequantisedBlocks
from lora.export.whole import rounded, write_whole
from lora.pretrained.hf_weights import map_decoder, read_stored_dtypes, write_decoder
from lora.pretrained.mapped import MappedModel
from lora.pretrained.model_files import save_tokenizer_files

MergedDtype = Literal["float32", "bfloat16", "float16", "nf4"]
_BY_NAME = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class MergedModel:
    """What was written, and how far its logits are from the adapted model's."""

    layers: int
    """Number of merged layers."""
    dtypes: tuple[str, ...]
    """Dtypes of the file, the most frequent first."""
    relative_error: float
    """‖difference‖ / ‖reference‖ of the logits, rounding to the file's dtypes included."""
    tolerance: float | None
    """Largest `relative_error` allowed; None where it was merged into nf4 on request."""
    over: str | None = None
    """The quantised base whose values were merged, in words; None: they are not rounded."""
    base_change: float | None = None
    """Of the logits over the values that were merged against those that the adapter was trained
    over; None: they are the same."""


@torch.no_grad()
def write_merged(
    mapped: MappedModel,
    ids: Tensor,
    *,
    base: Path,
    tokenizer: TextTokenizer,
    folder: Path,
    dtype: MergedDtype | None = None,
    device: torch.device = CPU,
    values: MergedValues = AS_STORED,
    requantise: bool = False,
) -> MergedModel:
    """Write the model `mapped`, which has an adapter, merged into `folder`, and verify it.

    Weights are summed in fp32, a layer at a time, and rounded once: each tensor to the dtype that
    it has in the directory `base`, or to `dtype`. The logits of the written files on `ids` (1, T)
    are compared with the adapted model's, both computed in fp32 on `device`. A model that
    transformers runs is merged as a whole, in fp32, in place.

    The base's weights are merged as `values` says; where the adapter was trained over others, the
    change of the logits is measured. In nf4 it is written only if it is to `requantise`.

    Raises AdapterError if the logits differ by more than the dtype's tolerance, or if a value is
    beyond its dtype; `folder` then holds an incomplete model (write to the path of an OutputPath).
    """
    n_layers, model = len(lora_layers(mapped.model)), mapped.model
    over, change = quantisation_of(model) or values.rounded_as, None
    if isinstance(model, Decoder):
        blocks = DecoderBlocks(model, mapped.release, device, values.rounded_as)
        before = logits_by_block(blocks, ids)
        if values.are_others:
            others = DecoderBlocks(model, mapped.release, device, values.trained_as)
            change = logits_error(before, logits_by_block(others, ids))
        if dtype == "nf4":
            error = _write_in_4bit(blocks, before, ids, base, folder, over, requantise=requantise)
            save_tokenizer_files(tokenizer, base, folder)
            return MergedModel(n_layers, ("nf4",), error, None, _in_words(over), change)
        after, kinds = _write_by_block(blocks, ids, base, folder, dtype, device)
    elif dtype == "nf4":
        raise UnsupportedModelError(
            f"Cannot merge this {model.config.family!r} model into nf4: transformers runs it, and "
            "only native decoders are written in 4 bits. Leave dtype nf4 out."
        )
    else:
        trained_as, rounded_as = values.trained_as, values.rounded_as
        change = measured_change(model, trained_as, rounded_as) if values.are_others else None
        if rounded_as is not None:
            round_base(model, rounded_as)
        kind = None if dtype is None else _BY_NAME[dtype]
        before, after, kinds = write_whole(
            model, ids, base=base, folder=folder, dtype=kind, device=device
        )
    error = logits_error(after, before)
    tolerance = max(TOLERANCES[kind] for kind in kinds)
    if not error <= tolerance:  # NaN is refused too
        raise AdapterError(
            f"Cannot merge: in the dtypes of the file the logits differ by {error:.2e} "
            f"(‖difference‖ / ‖reference‖), allowed is {tolerance:.2g}. Nothing was written. Use "
            "--dtype float32."
        )
    save_tokenizer_files(tokenizer, base, folder)
    by_count = sorted(set(kinds), key=kinds.count, reverse=True)
    names = tuple(str(kind).removeprefix("torch.") for kind in by_count)
    return MergedModel(n_layers, names, error, tolerance, _in_words(over), change)


def _in_words(kind: BaseQuantisation | None) -> str | None:
    return None if kind is None else str(kind)


def _write_in_4bit(
    blocks: DecoderBlocks,
    before: Tensor,
    ids: Tensor,
    base: Path,
    folder: Path,
    over: BaseQuantisation | None,
    *,
    requantise: bool,
) -> float:
    """Write the merged decoder in nf4; return the change of the logits (T, V) from `before`.

    With the settings of the base that it was trained over, if that was nf4. Raises AdapterError
    with the change unless it is to `requantise`.
    """
    settings = over if over is not None and over.dtype == "nf4" else None
    kinds = _dtypes_to_write(blocks, base, None)
    usual = str(max(set(kinds.values()), key=list(kinds.values()).count)).removeprefix("torch.")
    kind = settings or default_kind("nf4")
    requantised = RequantisedBlocks(blocks, replace(kind, embeddings=False, compute_dtype=usual))
    change = logits_error(logits_by_block(requantised, ids), before)
    if not requantise:
        raise AdapterError(
            f"Cannot merge into nf4 as it is: rounding the merged weights to 4 bits again changes "
            f"the logits by {change:.1e} (‖difference‖ / ‖reference‖). Nothing was written. Leave "
            "dtype nf4 out to merge without this loss, or accept it with requantise."
        )
    requantised.write(kinds, folder)
    return change


def _write_by_block(
    blocks: DecoderBlocks,
    ids: Tensor,
    base: Path,
    folder: Path,
    dtype: MergedDtype | None,
    device: torch.device,
) -> tuple[Tensor, list[torch.dtype]]:
    """Write the merged decoder; return the logits (T, V) of the files, and their dtypes."""
    dtypes = _dtypes_to_write(blocks, base, dtype)

    def parts(name: str) -> Iterator[Tensor]:
        for part in blocks.parts(name):
            yield rounded(part, dtypes[name], name)

    write_decoder(blocks.config, dtypes, parts, folder)
    written = map_decoder(folder)
    after = logits_by_block(DecoderBlocks(written.model, written.release, device), ids)
    return after, list(dtypes.values())


def _dtypes_to_write(
    blocks: DecoderBlocks, base: Path, dtype: MergedDtype | None
) -> dict[str, torch.dtype]:
    if dtype is not None:
        return dict.fromkeys(blocks.shapes, _BY_NAME[dtype])
    stored = read_stored_dtypes(base)
    kinds = list(stored.values())
    usual = max(set(kinds), key=kinds.count)  # for a head that had no weight of its own before
    return {name: stored.get(name, usual) for name in blocks.shapes}
