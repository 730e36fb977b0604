"""Export a model as a GGUF file for llama.cpp and its relatives, and verify what was written.

report = export_gguf("runs/mine/model", "mine.q8_0.gguf", dtype="q8_0")
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from lora.data.tokenizers.subword import TextTokenizer, load_tokenizer
from lora.decoder.decoder import Decoder
from lora.decoder.families import FAMILIES, decoder_config
from lora.decoder.language_model import LanguageModel
from lora.decoder.quantised.record import BaseQuantisation
from lora.errors import ConfigError, ModelError, UnsupportedModelError, did_you_mean, gather
from lora.export.blockwise import DecoderBlocks, GGUFBlocks, logits_by_block, logits_error
from lora.pretrained.gguf_config import gguf_config
from lora.pretrained.gguf_file import GGUFFile
from lora.pretrained.gguf_vocabulary import describe_tokenizer
from lora.pretrained.gguf_weights import GGUFWeights
from lora.pretrained.gguf_writer import (
    GGUFType,
    describe_decoder,
    name_tensors,
    write_gguf,
)
from lora.pretrained.hf_weights import map_decoder
from lora.pretrained.load.implementation import Implementation
from lora.pretrained.mapped import MappedModel
from lora.runs.disk import disk_error
from lora.runs.outputs import OutputPath

TOLERANCES: dict[str, float] = {"f32": 0.0, "f16": 1e-3, "q8_0": 1e-2}
"""Largest ‖difference‖ / ‖reference‖ of a tensor when read back, by dtype.

Rounding of normally distributed values gives 0, 2e-4 and 6e-3."""


LOGITS_TOLERANCES: dict[str, float] = {"f32": 1e-4, "f16": 1e-2, "q8_0": 1e-1}
"""Largest ‖difference‖ / ‖reference‖ of the logits, by dtype of the file; computed in fp32."""
CHECKED_TOKENS = 32
"""Number of random tokens for which logits are compared."""


@dataclass(frozen=True)
class GGUFReport:
    """A written GGUF file, and how far it is from the model."""

    path: Path
    size_bytes: int
    errors: dict[str, float]
    """‖difference‖ / ‖reference‖ of each tensor, by Hugging Face's names."""
    tolerance: float
    logits_error: float
    """‖difference‖ / ‖reference‖ of the logits."""
    logits_tolerance: float

    @property
    def worst(self) -> tuple[str, float]:
        """The tensor with the largest error, and that error."""
        return max(self.errors.items(), key=lambda item: item[1])


def export_gguf(
    source: LanguageModel | MappedModel | Path | str,
    out: Path | str,
    dtype: GGUFType = "f16",
    *,
    tokenizer: TextTokenizer | None = None,
    name: str | None = None,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
    rounded_as: BaseQuantisation | None = None,
) -> GGUFReport:
    """Write a model as the GGUF file `out`, completely or not at all, and verify it.

    `source` is a model's folder, or a decoder with its `tokenizer`; an adapter on it is merged
    into the file, in fp32, and no more than one block is held beside `source`. Matrices
    are stored as `dtype`; norms and biases as F32. The file is read back: settings and tokenizer
    must be equal, tensors within TOLERANCES and logits within LOGITS_TOLERANCES.
    A quantised base is unpacked; a mapped one gets the values of a base that is `rounded_as` the
    adapter's was.
    A file that exists is replaced only with `overwrite`, and never if it is among the `inputs`, of
    which a `source` that is a folder is one.
    Raises ModelError and DataError for what the format cannot store, ConfigError if something is
    in the way.
    """
    out = Path(out)
    if dtype not in get_args(GGUFType):
        near = did_you_mean(str(dtype), get_args(GGUFType))
        allowed = ", ".join(get_args(GGUFType))
        raise ConfigError(f"dtype={dtype!r}: allowed are {allowed}.{near}")
    read = inputs if isinstance(source, LanguageModel | MappedModel) else (Path(source), *inputs)
    output = OutputPath(out, tuple(read), overwrite)
    output.check()
    if isinstance(source, LanguageModel):
        blocks, own_name = DecoderBlocks(_native(source)), out.stem
    elif isinstance(source, MappedModel):
        model, own_name = _native(source.model), out.stem
        blocks = DecoderBlocks(model, source.release, kind=rounded_as)
    else:
        mapped = map_decoder(Path(source))
        blocks, own_name = DecoderBlocks(mapped.model, mapped.release), Path(source).resolve().name
        tokenizer = tokenizer or load_tokenizer(Path(source))
    if tokenizer is None:
        raise ConfigError("Cannot export a decoder without its tokenizer: pass tokenizer=… too.")
    config = blocks.config
    metadata: dict[str, Any] = {"general.name": name or own_name, "general.type": "model"}
    metadata |= describe_decoder(config)
    metadata |= describe_tokenizer(tokenizer, config.vocab_size)
    try:
        with output.building() as part:
            write_gguf(part, config, blocks.shapes, blocks.file_blocks, metadata, dtype)
            errors = _compare(part, blocks, metadata, TOLERANCES[dtype])
            logits_tolerance = LOGITS_TOLERANCES[dtype]
            logits_error = _compare_logits(part, blocks, logits_tolerance)
            with part.open("rb") as file:
                os.fsync(file.fileno())
    except OSError as error:
        raise disk_error(out, error) from error
    size_bytes, tolerance = out.stat().st_size, TOLERANCES[dtype]
    return GGUFReport(out, size_bytes, errors, tolerance, logits_error, logits_tolerance)


def check_gguf(implementation: Implementation, config: dict[str, Any]) -> None:
    """Raise UnsupportedModelError for a model of which no GGUF file can be written."""
    if implementation.kind != "native":
        raise UnsupportedModelError(_no_gguf(repr(config.get("model_type"))))


def _native(model: LanguageModel) -> Decoder:
    if isinstance(model, Decoder):
        return model
    raise UnsupportedModelError(_no_gguf(repr(model.config.family)))


def _no_gguf(family: str) -> str:
    return (
        f"Cannot write this {family} model as GGUF: there is no native decoder for it, which would "
        f"write and check the file. Native here: {', '.join(sorted(FAMILIES))}. Merge the adapter "
        "(lora merge) and convert the directory with llama.cpp's convert_hf_to_gguf.py."
    )


def _compare(
    path: Path, blocks: DecoderBlocks, metadata: dict[str, Any], tolerance: float
) -> dict[str, float]:
    """Return the error of each tensor in the file. Raises ModelError if the model differs."""
    file, config = GGUFFile(path), blocks.config
    again = dataclasses.replace(decoder_config(gguf_config(file)), family=config.family)
    wanted, seen = dataclasses.asdict(config), dataclasses.asdict(again)
    names = [f.name for f in dataclasses.fields(config) if f.compare]
    faults = [f"{name} reads back as {seen[name]}" for name in names if seen[name] != wanted[name]]
    keys = [key for key in metadata if key.startswith("tokenizer.")]
    faults += [
        f"{k} reads back with another value" for k in keys if file.metadata.get(k) != metadata[k]
    ]
    errors = {}
    for name, new in name_tensors(config, list(blocks.shapes)).items():
        errors[name] = relative_error(file.blocks(new), blocks.file_blocks(name))
        if not errors[name] <= tolerance:
            faults.append(f"{name} differs by {errors[name]:.2g}, allowed is {tolerance:g}")
    if faults:
        heading = "Cannot write the model as GGUF without loss:"
        raise ModelError(gather(faults, heading, "Use another dtype, or keep the folder."))
    return errors


def _compare_logits(path: Path, blocks: DecoderBlocks, tolerance: float) -> float:
    """Return the error of the file's logits against the model's, whose adapter is not merged.

    Raises ModelError if it is above `tolerance`.
    """
    draw = torch.Generator().manual_seed(0)
    length = min(CHECKED_TOKENS, blocks.config.max_position_embeddings)
    ids = torch.randint(0, blocks.config.vocab_size, (1, length), generator=draw)
    trained = blocks.trained_ids()[: length // 2]  # an adapter's new tokens, for one
    ids[0, : len(trained)] = torch.tensor(trained, dtype=torch.int64)
    before = logits_by_block(blocks, ids)
    error = logits_error(logits_by_block(GGUFBlocks(GGUFWeights(path)), ids), before)
    if not error <= tolerance:  # NaN is refused too
        raise ModelError(
            f"Cannot write the model as GGUF: the file's logits differ by {error:.2e} "
            f"(‖difference‖ / ‖reference‖), allowed is {tolerance:.2g}. Nothing was written. Use "
            "another dtype, or keep the folder."
        )
    return error


def relative_error(values: Iterable[np.ndarray], references: Iterable[np.ndarray]) -> float:
    """Return ‖value - reference‖ / ‖reference‖ of two tensors that come in the same blocks."""
    scale = difference = 0.0  # squared norms
    for value, reference in zip(values, references, strict=True):
        scale += float(np.linalg.norm(reference)) ** 2
        difference += float(np.linalg.norm(value - reference)) ** 2
    return math.sqrt(difference / scale) if scale else math.sqrt(difference)
