"""Models and adapters for other programs: GGUF files for llama.cpp's, a check of adapters for vLLM.

report = export_gguf("runs/mine/model", "mine.q8_0.gguf", dtype="q8_0")
faults = check_adapter_for_vllm("runs/mine/adapter")
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from lora.adapters.merge import TOLERANCES as MERGE_TOLERANCES
from lora.adapters.peft_fields import check_fields
from lora.adapters.peft_files import read_adapter_files
from lora.data.tokenizers.subword import TextTokenizer, load_tokenizer
from lora.decoder.config import DecoderConfig
from lora.decoder.decoder import Decoder, build_empty_decoder
from lora.decoder.families import decoder_config
from lora.device import available_bytes, resident_bytes
from lora.errors import AdapterError, ConfigError, ModelError, did_you_mean, gather
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

TOLERANCES: dict[str, float] = {"f32": 0.0, "f16": 1e-3, "q8_0": 1e-2}
"""Largest ‖difference‖ / ‖reference‖ of a tensor, read back, by type.

Rounding of normally distributed values gives 0, 2e-4 and 6e-3."""


LOGITS_TOLERANCES: dict[str, float] = {"f32": 1e-4, "f16": 1e-2, "q8_0": 1e-1}
"""Largest ‖difference‖ / ‖reference‖ of the logits, by type; of models that are not in fp32 that
of merging in their type, if it is larger."""
CHECKED_TOKENS = 32


@dataclass(frozen=True)
class GGUFReport:
    """What was written, and how near to the model it is."""

    path: Path
    size_bytes: int
    errors: dict[str, float]
    """‖difference‖ / ‖reference‖ of each tensor, by Hugging Face's names."""
    tolerance: float
    logits_error: float | None
    """‖difference‖ / ‖reference‖ of the logits; None where memory holds no second model."""
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
) -> GGUFReport:
    """Write a model as one GGUF file `out`, whole or not at all, and read it back.

    `source` is a model's folder, or a decoder without LoRA (merge it first) and its `tokenizer`.
    Matrices are stored as `dtype`; norms and biases as F32. The file's settings and tokenizer must
    come back the same, its tensors within TOLERANCES and its logits within LOGITS_TOLERANCES.
    Raises ModelError and DataError for what the format cannot hold.
    """
    out = Path(out)
    if dtype not in get_args(GGUFType):
        near = did_you_mean(str(dtype), get_args(GGUFType))
        allowed = ", ".join(get_args(GGUFType))
        raise ConfigError(f"dtype={dtype!r}: allowed are {allowed}.{near}")
    if isinstance(source, Decoder):
        model, own_name = source, out.stem
    else:
        model, own_name = _load(Path(source)), Path(source).resolve().name
        tokenizer = tokenizer or load_tokenizer(Path(source))
    if tokenizer is None:
        raise ConfigError("A decoder was given without its tokenizer: pass tokenizer=… too.")
    parameters = _plain_parameters(model)
    metadata: dict[str, Any] = {"general.name": name or own_name, "general.type": "model"}
    metadata |= describe_decoder(model.config)
    metadata |= describe_tokenizer(tokenizer, model.config.vocab_size)
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            part = Path(folder) / "model.gguf"
            write_gguf(part, model.config, parameters, metadata, dtype)
            errors = _compare(part, model.config, parameters, metadata, TOLERANCES[dtype])
            logits_tolerance = max(
                LOGITS_TOLERANCES[dtype],
                *(MERGE_TOLERANCES.get(p.dtype, 0) for p in parameters.values()),
            )
            logits_error = _compare_logits(part, model, logits_tolerance)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(part, out)
    except OSError as error:
        raise ModelError(
            f"{out} could not be written: {error.strerror}. Free some space, or choose another "
            "folder."
        ) from error
    size_bytes, tolerance = out.stat().st_size, TOLERANCES[dtype]
    return GGUFReport(out, size_bytes, errors, tolerance, logits_error, logits_tolerance)


def _load(folder: Path) -> Decoder:
    """Return the decoder in `folder` in the type its file has, so that nothing is copied."""
    kinds = set()
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                kinds |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            break  # load_decoder says it in better words
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16}
    only = dtypes.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32
    return load_decoder(folder, dtype=only)


def _plain_parameters(model: Decoder) -> dict[str, torch.Tensor]:
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
    wanted = {n: p.shape for n, p in build_empty_decoder(model.config).named_parameters()}
    if {n: p.shape for n, p in parameters.items()} != wanted:
        odd = sorted(parameters.keys() ^ wanted.keys())[:3]
        raise ModelError(
            f"The model has other tensors than a plain {model.config.family!r} model (such as "
            f"{', '.join(odd) or 'one of another shape'}). Merge its LoRA first: merge_lora(model)."
        )
    return parameters


def _compare(
    path: Path,
    config: DecoderConfig,
    parameters: dict[str, torch.Tensor],
    metadata: dict[str, Any],
    tolerance: float,
) -> dict[str, float]:
    """Return the error of each tensor in the file. Raises ModelError if it is not the model."""
    file = GGUFFile(path)
    again = dataclasses.replace(decoder_config(gguf_config(file)), family=config.family)
    wanted, seen = dataclasses.asdict(config), dataclasses.asdict(again)
    names = [f.name for f in dataclasses.fields(config) if f.compare]
    faults = [f"{name} comes back as {seen[name]}" for name in names if seen[name] != wanted[name]]
    words = [key for key in metadata if key.startswith("tokenizer.")]
    faults += [f"{k} comes back otherwise" for k in words if file.metadata.get(k) != metadata[k]]
    errors = {}
    for name, new in name_tensors(config, list(parameters)).items():
        reference = file_values(config, name, parameters[name])
        errors[name] = _relative_error(file.values(new), reference)
        if not errors[name] <= tolerance:
            faults.append(f"{name} is off by {errors[name]:.2g}, more than {tolerance:g}")
    if faults:
        heading = "The model cannot be written as GGUF without loss:"
        raise ModelError(gather(faults, heading, "Use another type, or keep the folder."))
    return errors


@torch.no_grad()
def _compare_logits(path: Path, model: Decoder, tolerance: float) -> float | None:
    """Return how far the file's model answers from `model`; None if memory cannot hold both.

    Raises ModelError if that is too far.
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
            f"The model was to be written as GGUF, and the file's logits differ by {error:.2e} "
            f"(‖difference‖ / ‖reference‖); allowed is {tolerance:.2g}. Nothing was written. Use "
            "another type, or keep the folder."
        )
    return error


def _relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    scale = float(np.linalg.norm(reference))
    difference = float(np.linalg.norm(value - reference))
    return difference / scale if scale else difference


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be; it makes room for adapters of that rank and below."""
_VLLM_LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
_VLLM_ENDS = {"lm_head", "embed_tokens"}
_VLLM_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>.+?)\."
    r"(lora_[AB]\.weight|lora_embedding_[AB])"
)
_TRAINED_ROWS = ".token_adapter."  # their field of the config has said it
_VLLM_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_VLLM_READS = (
    "r",
    "lora_alpha",
    "target_modules",
    "modules_to_save",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
)
_VLLM_REFUSES = {
    "use_dora": "DoRA is not supported. Merge the adapter into the model and serve that",
    "use_qalora": "QA-LoRA is not supported. Merge the adapter into the model and serve that",
    "lora_bias": "biases of B are not supported. Train with lora_bias=false",
    "alora_invocation_tokens": "activated LoRA is not supported. Train a plain adapter",
    "layer_replication": "repeated blocks are not supported. Save the repeated model whole",
    "trainable_token_indices": "trained tokens need a server started for them. Merge the adapter",
}


def check_adapter_for_vllm(folder: Path | str) -> list[str]:
    """Return what keeps vLLM from serving the adapter in `folder`, and what to do about each.

    An empty list means that vLLM takes it, started as `vllm_command` says. Raises AdapterError if
    there is no adapter that can be read. Source: vLLM's PEFTHelper, LoRAConfig and LoRAModel.
    """
    files = read_adapter_files(Path(folder))
    described, wrong = _sound_fields(files.described)
    faults = files.faults + wrong
    for key, why in _VLLM_REFUSES.items():
        if described.get(key):
            faults.append(f"{key}={described[key]!r}: {why}.")
    if described.get("bias", "none") != "none":
        faults.append(f"bias={described['bias']!r}: only 'none' is supported. Merge the adapter.")
    start = described.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _VLLM_STARTS:
        faults.append(
            f"init_lora_weights={start!r}: this start changes the base's weights. Convert the "
            "adapter with PEFT: save_pretrained with path_initial_model_for_weight_conversion."
        )
    saved = described.get("modules_to_save") or []
    if set(saved) - {"classifier", "score"}:
        faults.append(
            f"modules_to_save={saved!r}: modules that were trained whole are not supported. Merge "
            "the adapter into the model and serve that."
        )
    faults += _rank_faults(described)
    return faults + _tensor_faults(list(files.tensors), saved)


def _sound_fields(described: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the fields without those of a wrong type, and a fault for each of these."""
    read = {"peft_type": "LORA", **{key: described.get(key) for key in _VLLM_READS}}
    if described.get("peft_type") is not None:
        read["peft_type"] = described["peft_type"]
    faults = check_fields(read)
    wrong = {fault.partition("=")[0] for fault in faults}
    sound = {key: value for key, value in described.items() if key not in wrong}
    return sound, [f"{fault}. Save the adapter again." for fault in faults]


def _rank_faults(described: dict[str, Any]) -> list[str]:
    faults = []
    rank = _highest_rank(described)
    if rank is not None and rank > VLLM_RANKS[-1]:
        faults.append(f"rank {rank}: at most {VLLM_RANKS[-1]} is supported. Train a smaller one.")
    for key in ("rank_pattern", "alpha_pattern"):
        if described.get(key):
            faults.append(
                f"{key}={described[key]!r}: most releases of vLLM ignore it and scale every layer "
                "by lora_alpha / r, without a word. Train with one rank and alpha, or merge."
            )
    return faults


def _tensor_faults(names: list[str], saved: list[str]) -> list[str]:
    modules, odd = set(), []
    for name in names:
        found = _VLLM_TENSOR.fullmatch(name)
        if found is not None:
            modules.add(found["module"].rpartition(".")[2])
        elif _TRAINED_ROWS not in name and not any(f".{module}." in name for module in saved):
            odd.append(name)
    faults = []
    if odd:
        shown = f"{', '.join(odd[:3])}{' …' if len(odd) > 3 else ''}"
        faults.append(f"{shown}: only lora_A and lora_B are read. Save the adapter without them.")
    ends = sorted(modules & _VLLM_ENDS)
    if ends:
        faults.append(
            f"{', '.join(ends)} adapted: vLLM takes that for some architectures only, such as "
            "Llama. Leave them out of targets, or merge the adapter into the model."
        )
    others = sorted(modules - _VLLM_ENDS - _VLLM_LINEARS)
    if others:
        faults.append(
            f"{', '.join(others)} adapted: of Llama-like models vLLM adapts "
            f"{', '.join(sorted(_VLLM_LINEARS))}. Merge the adapter into the model."
        )
    return faults


def _highest_rank(described: dict[str, Any]) -> int | None:
    """Return the highest rank in sound fields; None where `r` was not sound."""
    ranks = [described.get("r"), *(described.get("rank_pattern") or {}).values()]
    return None if ranks[0] is None else max(ranks)


def vllm_command(folder: Path | str, base: str, name: str | None = None) -> str:
    """Return the command that serves the adapter in `folder` on the model `base` with vLLM.

    It asks for the smallest rank that has room: vLLM's default of 16 refuses larger adapters.
    Raises AdapterError if there is no adapter, or none that says its rank.
    """
    folder = Path(folder)
    described, faults = _sound_fields(read_adapter_files(folder).described)
    rank = _highest_rank(described)
    if rank is None:
        raise AdapterError(gather(faults, f"{folder} cannot be served:", "Name another adapter."))
    room = next((n for n in VLLM_RANKS if n >= rank), VLLM_RANKS[-1])
    adapter = shlex.quote(f"{name or folder.resolve().name}={folder}")
    return (
        f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {room} "
        f"--lora-modules {adapter}"
    )
