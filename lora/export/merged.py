"""A merged model written as a Hugging Face directory, in the base's dtypes and with its settings.

report = write_merged(mapped, ids, base=Path("base"), tokenizer=tokenizer, folder=Path("merged"))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lora.adapters.apply import lora_layers
from lora.adapters.merge import TOLERANCES
from lora.data.tokenizers.subword import TextTokenizer
from lora.decoder.decoder import Decoder
from lora.errors import AdapterError
from lora.export.blockwise import CPU, DecoderBlocks, logits_by_block, logits_error
from lora.export.whole import rounded, write_whole
from lora.pretrained.hf_weights import map_decoder, read_stored_dtypes, write_decoder
from lora.pretrained.mapped import MappedModel
from lora.pretrained.model_files import save_tokenizer_files

MergedDtype = Literal["float32", "bfloat16", "float16"]
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
    tolerance: float


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
) -> MergedModel:
    """Write the model `mapped`, which has an adapter, merged into `folder`, and verify it.

    Weights are summed in fp32, a layer at a time, and rounded once: each tensor to the dtype that
    it has in the directory `base`, or to `dtype`. The logits of the written files on `ids` (1, T)
    are compared with the adapted model's, both computed in fp32 on `device`. A model that
    transformers runs is merged as a whole, in fp32, in place.

    Raises AdapterError if they differ by more than the dtype's tolerance, or if a value is beyond
    its dtype; `folder` then holds an incomplete model (write to the path of an OutputPath).
    """
    n_layers = len(lora_layers(mapped.model))
    if isinstance(mapped.model, Decoder):
        before, after, kinds = _write_by_block(
            DecoderBlocks(mapped.model, mapped.release, device), ids, base, folder, dtype, device
        )
    else:
        kind = None if dtype is None else _BY_NAME[dtype]
        before, after, kinds = write_whole(
            mapped.model, ids, base=base, folder=folder, dtype=kind, device=device
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
    return MergedModel(n_layers, names, error, tolerance)


def _write_by_block(
    blocks: DecoderBlocks,
    ids: Tensor,
    base: Path,
    folder: Path,
    dtype: MergedDtype | None,
    device: torch.device,
) -> tuple[Tensor, Tensor, list[torch.dtype]]:
    """Write the merged decoder; return the logits (T, V) before and after, and the dtypes."""
    before = logits_by_block(blocks, ids)
    dtypes = _dtypes_to_write(blocks, base, dtype)

    def parts(name: str) -> Iterator[Tensor]:
        for part in blocks.parts(name):
            yield rounded(part, dtypes[name], name)

    write_decoder(blocks.config, dtypes, parts, folder)
    written = map_decoder(folder)
    after = logits_by_block(DecoderBlocks(written.model, written.release, device), ids)
    return before, after, list(dtypes.values())


def _dtypes_to_write(
    blocks: DecoderBlocks, base: Path, dtype: MergedDtype | None
) -> dict[str, torch.dtype]:
    if dtype is not None:
        return dict.fromkeys(blocks.shapes, _BY_NAME[dtype])
    stored = read_stored_dtypes(base)
    kinds = list(stored.values())
    usual = max(set(kinds), key=kinds.count)  # for a head that had no weight of its own before
    return {name: stored.get(name, usual) for name in blocks.shapes}
