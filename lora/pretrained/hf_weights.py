"""Decoders loaded from and saved to Hugging Face folders: config.json and *.safetensors.

The files are memory-mapped: a parameter whose dtype does not change *is* the mapping (private,
copied page by page only where it is written to), so an fp32 file takes its size once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lora.config import BaseWeights
from lora.decoder.config import DecoderConfig
from lora.decoder.decoder import Decoder, assign_parameters, build_empty_decoder
from lora.decoder.families import FAMILIES, decoder_config
from lora.decoder.quantised.base import QuantisedWeight, refuse_quantised
from lora.errors import ModelError, did_you_mean, gather
from lora.layers.quantised_model import use_quantised_linears
from lora.pretrained.hf_files import StoredTensor, open_tensors, read_config
from lora.pretrained.load.architectures import describe_architecture
from lora.pretrained.load.shards import (
    MAX_SHARD_BYTES,
    split_into_shards,
    write_json,
    write_shards,
    writing_into,
)
from lora.pretrained.mapped import MappedFile, MappedModel
from lora.pretrained.quantised.folder import cannot_load, describe_packed, not_packed
from lora.pretrained.quantised.linears import NOT_PACKABLE, load_packed_linears, packable_linears
from lora.pretrained.quantised.methods import (
    is_4bit,
    refuse_tensors,
    settings_of,
    without_settings,
)
from lora.pretrained.quantised.stored import StoredNf4, collect_packed
from lora.runs.tensor_files import TensorParts

_HEAD = "lm_head.weight"
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
NO_PARAMETERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)")
"""Tables in older files that are computed here: rotary frequencies, causal masks."""


def load_decoder(
    folder: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    base: BaseWeights | None = None,
) -> Decoder:
    """Return the decoder in `folder`, with parameters of `dtype` on `device`.

    The linears of its blocks are stored as `base` says (`lora.decoder.quantised`), quantised one
    after the other as they are read. Of a folder in 4 bits they are packed as they are stored
    there, and those that it leaves plain stay plain.

    Raises ModelError for a folder without config.json or safetensors files, an unsupported
    architecture or a damaged file, and once for all tensors that are missing, unexpected,
    of a wrong shape or not floating-point; for one that is quantised and not finite. ConfigError
    for a `base` that a folder in 4 bits is not.
    """
    folder = Path(folder)
    model = _empty_model(folder)
    with ExitStack() as files:
        source = open_tensors(folder, files)
        stored = _match_names(model, source, folder)  # by the shapes before quantisation
        plain, packed = _parted(stored)
        asked = base or BaseWeights()
        if packed:
            describe_packed(folder, packed).settled(asked)  # raises if it is another
            load_packed_linears(model, packed, dtype=dtype, device=device)
        else:
            use_quantised_linears(model, asked)
        releases = asked.is_quantised and not packed
        _assign(model, _read(model.config, plain, dtype, device, releases=releases))
        _check_tied_head(model, source, folder)
    return model


def _empty_model(folder: Path) -> Decoder:
    """Return the decoder that config.json describes, on the meta device.

    Raises ModelError by name for weights that are quantised otherwise than in bitsandbytes' nf4.
    """
    config = read_config(folder)
    is_4bit(config, describe_architecture(config))
    return build_empty_decoder(decoder_config(config))


@dataclass(frozen=True)
class MappedDecoder(MappedModel):
    """A decoder whose parameters are views of its files, in the dtypes they have there."""

    model: Decoder


def map_decoder(folder: Path) -> MappedDecoder:
    """Return the decoder in `folder`, on the CPU; nothing is read before it is used.

    Its parameters must not be changed in place. Raises ModelError as `load_decoder` does.
    """
    model = _empty_model(folder)
    with ExitStack() as files:
        source = open_tensors(folder, files)
        plain, packed = _parted(_match_names(model, source, folder))
        stored = [*plain.values(), *(part for w in packed.values() for part in w.stored)]
        mapped = {path: MappedFile(path) for path in {tensor.path for tensor in stored}}
        load_packed_linears(model, packed, read=lambda s: mapped[s.path].tensor(s.name))
        tensors = ((n, mapped[tensor.path].tensor(tensor.name)) for n, tensor in plain.items())
        config = model.config
        assign_parameters(
            model, ((n, t.T if config.is_transposed_in_files(n) else t) for n, t in tensors)
        )
        _check_tied_head(model, source, folder)
    model.requires_grad_(False)
    return MappedDecoder(model, tuple(mapped.values()))


def _parted(
    stored: Mapping[str, StoredTensor | StoredNf4],
) -> tuple[dict[str, StoredTensor], dict[str, StoredNf4]]:
    """Return plain and packed ones apart."""
    packed = {name: found for name, found in stored.items() if isinstance(found, StoredNf4)}
    plain = {name: found for name, found in stored.items() if isinstance(found, StoredTensor)}
    return plain, packed


def _match_names(
    model: Decoder, source: dict[str, StoredTensor], folder: Path
) -> dict[str, StoredTensor | StoredNf4]:
    """Return the stored tensor of each parameter of `model`; all faults are raised at once."""
    refuse_tensors(source, str(folder))
    collected, faults = collect_packed(source)
    if faults:
        raise ModelError(cannot_load(folder, faults))
    stored = _with_prefix(model, collected)
    is_plain = not any(isinstance(found, StoredNf4) for found in stored.values())
    if is_plain and settings_of(read_config(folder)) is not None:
        raise ModelError(not_packed(folder))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    linears = packable_linears(model)
    for name, shape in shapes.items():
        if name not in stored:
            faults.append(
                f"{name} {shape} is missing.{did_you_mean(name, set(stored) - set(shapes))}"
            )
            continue
        found = stored[name]
        is_packed = isinstance(found, StoredNf4)  # as (O, I), whatever a plain one is
        is_transposed = model.config.is_transposed_in_files(name) and not is_packed
        wanted = shape[::-1] if is_transposed else shape
        if found.shape != wanted:
            faults.append(f"{name} is {found.shape} in the file: config.json implies {wanted}")
        elif is_packed and name not in linears:
            faults.append(f"{name} {NOT_PACKABLE}")
        elif stored[name].dtype not in FLOATS:
            kinds = ", ".join(sorted(FLOATS))
            faults.append(f"{name} has dtype {stored[name].dtype} (allowed: {kinds})")
    for name in stored:
        is_spare_head = name == _HEAD and model.config.tie_word_embeddings
        if name not in shapes and not is_spare_head and not NO_PARAMETERS.fullmatch(name):
            faults.append(f"{name} {stored[name].shape} is not a tensor of this architecture")
    if faults:
        heading = f"Cannot load {folder}: its tensors do not match config.json:"
        advice = "Check that config.json and the weights belong together; download both again."
        raise ModelError(gather(faults, heading, advice))
    return {name: stored[name] for name in shapes}


def _with_prefix(
    model: Decoder, source: Mapping[str, StoredTensor | StoredNf4]
) -> dict[str, StoredTensor | StoredNf4]:
    """Return `source` under full names: some files (GPT-2's own) omit the trunk's name."""
    prefix = f"{model.trunk_name}."
    if any(name.startswith(prefix) for name in source):
        return dict(source)
    return {name if name == _HEAD else prefix + name: tensor for name, tensor in source.items()}


def _read(
    config: DecoderConfig,
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    releases: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Yield one parameter after the other, so that at most one is in memory twice.

    `releases`: the memory of what was read is given back, for weights that become others.
    """
    paths = {source.path for source in stored.values()} if releases else ()
    mapped = {path: MappedFile(path) for path in paths}
    for name, source in stored.items():
        file = mapped.get(source.path)
        if file is None:
            tensor = source.tensor()
        else:
            file.check_size()
            tensor = file.tensor(source.name)
        if config.is_transposed_in_files(name):
            tensor = tensor.T.contiguous()  # (I, O) -> (O, I)
        yield name, tensor.to(device=device, dtype=dtype)
        if file is not None:
            file.release()


def _assign(model: Decoder, tensors: Iterator[tuple[str, Tensor]]) -> None:
    def not_quantised() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if isinstance(module, QuantisedWeight) and leaf == "weight":
                module.load(tensor, name)
            else:
                yield name, tensor

    assign_parameters(model, not_quantised())


def _check_tied_head(model: Decoder, source: Mapping[str, StoredTensor], folder: Path) -> None:
    if not model.config.tie_word_embeddings or _HEAD not in source:
        return
    head, embedding = source[_HEAD].tensor(), _embedding_in_file(model, source)
    if head.shape != embedding.shape or not torch.equal(head.to(embedding), embedding):
        raise ModelError(
            f"Cannot load {folder}: config.json says tie_word_embeddings=true, and {_HEAD} in the "
            "file differs from the embedding. Set tie_word_embeddings to false to use the file's "
            "own head."
        )


def _embedding_in_file(model: Decoder, source: Mapping[str, StoredTensor]) -> Tensor:
    """Return the embedding of `model`, or what the file had where it has been quantised."""
    table = model.get_input_embeddings()
    if not isinstance(table, QuantisedWeight):
        return cast(Tensor, table.weight)
    name = next(name for name, module in model.named_modules() if module is table)
    found = _with_prefix(model, source)[f"{name}.weight"]
    assert isinstance(found, StoredTensor)
    return found.tensor()


def read_stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Return the dtype of each parameter in the files of the decoder in `folder`.

    Raises ModelError as `load_decoder` does.
    """
    model = _empty_model(folder)
    with ExitStack() as files:
        stored = _match_names(model, open_tensors(folder, files), folder)
        return {name: FLOATS[tensor.dtype] for name, tensor in stored.items()}


def save_decoder(
    model: Decoder, folder: Path | str, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `model` into `folder` as config.json and safetensors that transformers loads.

    A tied head is written once. Every file is written under a temporary name and then renamed, so
    a folder can be overwritten while a model is memory-mapped from it. Raises ModelError if
    `model` has tensors that the format cannot hold (LoRA that was not merged), and
    CheckpointError if writing fails.
    """
    tensors = _tensors_to_save(model)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def parts(name: str) -> Iterator[Tensor]:
        yield tensors[name]

    write_decoder(model.config, dtypes, parts, folder, max_shard_bytes=max_shard_bytes)


def write_decoder(
    config: DecoderConfig,
    dtypes: Mapping[str, torch.dtype],
    parts: Callable[[str], Iterator[Tensor]],
    folder: Path | str,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model into `folder` as `save_decoder` does, part by part of its parameters.

    `parts` yields the rows of a parameter, called by name, in order; they are cast to its dtype.
    Raises CheckpointError if writing fails.
    """
    folder = Path(folder)
    with writing_into(folder):
        _write_decoder(config, dtypes, parts, folder, max_shard_bytes)


def _write_decoder(
    config: DecoderConfig,
    dtypes: Mapping[str, torch.dtype],
    parts: Callable[[str], Iterator[Tensor]],
    folder: Path,
    max_shard_bytes: int,
) -> None:
    empty = dict(build_empty_decoder(config).named_parameters())
    sizes = {name: tensor.numel() * dtypes[name].itemsize for name, tensor in empty.items()}

    def layout(name: str) -> dict[str, TensorParts]:
        return {name: file_layout(config, name, tuple(empty[name].shape), dtypes[name], parts)}

    shards = split_into_shards(sizes, max_shard_bytes)
    write_shards(folder, shards, layout, sum(sizes.values()))
    found = list(dtypes.values())
    usual = max(dict.fromkeys(found), key=found.count)
    write_json(folder / "config.json", _config_to_save(config, usual))


def _tensors_to_save(model: Decoder) -> dict[str, Tensor]:
    refuse_quantised(model)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    expected = {name for name, _ in build_empty_decoder(model.config).named_parameters()}
    faults = [f"{name} is not a tensor of the format" for name in tensors if name not in expected]
    faults += [f"{name} is missing" for name in expected - set(tensors)]
    if faults:
        heading = f"Cannot save the model as a plain {model.config.family!r} model:"
        raise ModelError(gather(faults, heading, "Merge its LoRA first (merge_lora), or untie it."))
    return tensors


def file_layout(
    config: DecoderConfig,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    parts: Callable[[str], Iterator[Tensor]],
) -> TensorParts:
    """Return the parameter `name`, of this shape in the model, as a file holds it."""
    if config.is_transposed_in_files(name):
        return TensorParts(
            dtype, shape[::-1], lambda: iter((torch.cat([*parts(name)]).to(dtype).T,))
        )
    return TensorParts(dtype, shape, lambda: (part.to(dtype) for part in parts(name)))


def _config_to_save(config: DecoderConfig, dtype: torch.dtype) -> dict[str, Any]:
    kind = str(dtype).removeprefix("torch.")
    source = without_settings(config.source)
    kept = {name: value for name, value in source.items() if name != "dtype"}
    architecture = FAMILIES[config.family].architecture
    return {**kept, "architectures": [architecture], "torch_dtype": kind}
