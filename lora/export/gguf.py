"""Export a model as a GGUF file for llama.cpp and its relatives, and verify what was written.

report = export_gguf("runs/mine/model", "mine.q8_0.gguf", dtype="q8_0")
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from lora.adapters.merge import TOLERANCES as MERGE_TOLERANCES
from lora.data.tokenizers.subword import TextTokenizer, load_tokenizer
from lora.decoder.config import DecoderConfig
from lora.decoder.decoder import Decoder, build_empty_decoder
from lora.decoder.families import decoder_config
from lora.device import available_bytes, resident_bytes
from lora.errors import ConfigError, ModelError, did_you_mean, gather
from lora.pretrained.gguf_config import gguf_config
from lora.pretrained.gguf_file import GGUFFile
from lora.pretrained.gguf_vocabulary import describe_tokenizer
from lora.pretrained.gguf_weights import read_gguf_decoder
from lora.pretrained.gguf_writer import (
    GGUFType,
    describe_decoder,
    file_values,
    name_tensors,
    write_gguf,
)
from lora.pretrained.hf_weights import load_decoder
from lora.runs.disk import disk_error
from lora.runs.outputs import OutputPath

TOLERANCES: dict[str, float] = {"f32": 0.0, "f16": 1e-3, "q8_0": 1e-2}
"""Largest ‖difference‖ / ‖reference‖ of a tensor when read back, by dtype.

Rounding of normally distributed values gives 0, 2e-4 and 6e-3."""


LOGITS_TOLERANCES: dict[str, float] = {"f32": 1e-4, "f16": 1e-2, "q8_0": 1e-1}
"""Largest ‖difference‖ / ‖reference‖ of the logits, by dtype of the file.

For models that are not in fp32 the tolerance of merging in their dtype holds, if it is larger."""
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
    logits_error: float | None
    """‖difference‖ / ‖reference‖ of the logits; None if a second model did not fit in memory."""
    logits_tolerance: float

    @property
    def worst(self) -> tuple[str, float]:
        """The tensor with the largest error, and that error."""
        return max(self.errors.items(), key=lambda item: item[1])


def export_gguf(
    source: Decoder | Path | str,
    out: Path | str,
    dtype: GGUFType = "f16",
    *,
    tokenizer: TextTokenizer | None = None,
    name: str | None = None,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
) -> GGUFReport:
    """Write a model as the GGUF file `out`, completely or not at all, and verify it.

    `source` is a model's folder, or a decoder without LoRA (merge it first) with its `tokenizer`.
    Matrices are stored as `dtype`; norms and biases as F32. The file is read back: settings and
    tokenizer must be equal, tensors within TOLERANCES and logits within LOGITS_TOLERANCES.
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
    read = inputs if isinstance(source, Decoder) else (Path(source), *inputs)
    output = OutputPath(out, tuple(read), overwrite)
    output.check()
    if isinstance(source, Decoder):
        model, own_name = source, out.stem
    else:
        model, own_name = _load(Path(source)), Path(source).resolve().name
        tokenizer = tokenizer or load_tokenizer(Path(source))
    if tokenizer is None:
        raise ConfigError("Cannot export a decoder without its tokenizer: pass tokenizer=… too.")
    parameters = _plain_parameters(model)
    metadata: dict[str, Any] = {"general.name": name or own_name, "general.type": "model"}
    metadata |= describe_decoder(model.config)
    metadata |= describe_tokenizer(tokenizer, model.config.vocab_size)
    try:
        with output.building() as part:
            write_gguf(part, model.config, parameters, metadata, dtype)
            errors = _compare(part, model.config, parameters, metadata, TOLERANCES[dtype])
            logits_tolerance = max(
                LOGITS_TOLERANCES[dtype],
                *(MERGE_TOLERANCES.get(p.dtype, 0) for p in parameters.values()),
            )
            logits_error = _compare_logits(part, model, logits_tolerance)
            with part.open("rb") as file:
                os.fsync(file.fileno())
    except OSError as error:
        raise disk_error(out, error) from error
    size_bytes, tolerance = out.stat().st_size, TOLERANCES[dtype]
    return GGUFReport(out, size_bytes, errors, tolerance, logits_error, logits_tolerance)


def _load(folder: Path) -> Decoder:
    """Return the decoder in `folder` in the dtype of its files, so that nothing is copied."""
    kinds = set()
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                kinds |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            break  # load_decoder raises the error with a message
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16}
    only = dtypes.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32
    return load_decoder(folder, dtype=only)


def _plain_parameters(model: Decoder) -> dict[str, torch.Tensor]:
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
    wanted = {n: p.shape for n, p in build_empty_decoder(model.config).named_parameters()}
    if {n: p.shape for n, p in parameters.items()} != wanted:
        odd = sorted(parameters.keys() ^ wanted.keys())[:3]
        raise ModelError(
            f"Cannot export the model: a plain {model.config.family!r} model has other tensors "
            f"({', '.join(odd) or 'of other shapes'}). Merge its LoRA first: merge_lora(model)."
        )
    return parameters


def _compare(
    path: Path,
    config: DecoderConfig,
    parameters: dict[str, torch.Tensor],
    metadata: dict[str, Any],
    tolerance: float,
) -> dict[str, float]:
    """Return the error of each tensor in the file. Raises ModelError if the model differs."""
    file = GGUFFile(path)
    again = dataclasses.replace(decoder_config(gguf_config(file)), family=config.family)
    wanted, seen = dataclasses.asdict(config), dataclasses.asdict(again)
    names = [f.name for f in dataclasses.fields(config) if f.compare]
    faults = [f"{name} reads back as {seen[name]}" for name in names if seen[name] != wanted[name]]
    keys = [key for key in metadata if key.startswith("tokenizer.")]
    faults += [
        f"{k} reads back with another value" for k in keys if file.metadata.get(k) != metadata[k]
    ]
    errors = {}
    for name, new in name_tensors(config, list(parameters)).items():
        reference = file_values(config, name, parameters[name])
        errors[name] = _relative_error(file.values(new), reference)
        if not errors[name] <= tolerance:
            faults.append(f"{name} differs by {errors[name]:.2g}, allowed is {tolerance:g}")
    if faults:
        heading = "Cannot write the model as GGUF without loss:"
        raise ModelError(gather(faults, heading, "Use another dtype, or keep the folder."))
    return errors


@torch.no_grad()
def _compare_logits(path: Path, model: Decoder, tolerance: float) -> float | None:
    """Return the error of the file's logits against `model`; None if memory cannot hold both.

    Raises ModelError if it is above `tolerance`.
    """
    needed = 4 * sum(p.numel() for p in model.parameters())
    held, available = resident_bytes(), available_bytes("cpu")
    if available is not None and held + needed > available:
        return None
    draw = torch.Generator().manual_seed(0)
    length = min(CHECKED_TOKENS, model.config.max_position_embeddings)
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=draw)
    device = next(model.parameters()).device
    before = model(ids.to(device)).double().cpu()
    error = float((read_gguf_decoder(path)(ids).double() - before).norm() / before.norm())
    if not error <= tolerance:  # NaN is refused too
        raise ModelError(
            f"Cannot write the model as GGUF: the file's logits differ by {error:.2e} "
            f"(‖difference‖ / ‖reference‖), allowed is {tolerance:.2g}. Nothing was written. Use "
            "another dtype, or keep the folder."
        )
    return error


def _relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    scale = float(np.linalg.norm(reference))
    difference = float(np.linalg.norm(value - reference))
    return difference / scale if scale else difference
