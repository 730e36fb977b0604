"""Model folders in Hugging Face's layout: config.json and *.safetensors, read and written.

The files are memory-mapped: a parameter whose type need not change *is* the mapping (private,
copied page by page only where it is written to), so an fp32 file costs its size once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora.decoder.config import DecoderConfig
from lora.decoder.decoder import Decoder, assign_parameters, build_empty_decoder
from lora.decoder.families import FAMILIES, decoder_config
from lora.decoder.quantised import Fp8Linear, has_fp8_base, use_fp8_linears
from lora.errors import ModelError, ModelNotFoundError, did_you_mean, gather
from lora.runs.disk import disk_error
from lora.runs.tensor_files import write_tensors

MAX_SHARD_BYTES = 4 * 2**30
"""safetensors builds a whole file in memory before it writes: shards bound that."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HEAD = "lm_head.weight"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_NO_PARAMETERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(masked_)?bias)")
"""Tables that older files hold and that are computed: rotary frequencies, causal masks."""
_CONV1D = re.compile(r".*\.(c_attn|c_fc|c_proj)\.weight")
"""GPT-2's linears, whose weights lie transposed in files: (I, O)."""


def load_decoder(
    folder: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    fp8: bool = False,
) -> Decoder:
    """Return the decoder in `folder`, its parameters of type `dtype` on `device`.

    With `fp8` the linears of its blocks are kept in eight bits (`lora.decoder.quantised`), rounded
    one after the other while they are read.

    Raises ModelError for a folder without config.json or safetensors files, an unsupported
    architecture, a damaged file, and once for all tensors that are missing, unexpected,
    misshapen or not floating-point; with `fp8` for one that is not finite.
    """
    folder = Path(folder)
    model = build_empty_decoder(decoder_config(read_config(folder)))
    if fp8:
        use_fp8_linears(model)
    with ExitStack() as files:
        source = _open_tensors(folder, files)
        places = _match_names(model, source, folder)
        _assign(model, _read(model.config, places, dtype, device))
        _check_tied_head(model, source, folder)
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """Return the contents of `folder`/config.json. Raises ModelError if it cannot be read."""
    path = folder / "config.json"
    if not path.is_file():
        seen = "no such folder" if not folder.is_dir() else "the folder has none"
        kind = ModelError if folder.exists() else ModelNotFoundError
        raise kind(
            f"A model was asked for in {folder}: config.json is needed, and {seen}. Pass a "
            "folder that Hugging Face's save_pretrained wrote or that was downloaded whole."
        )
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}. Fetch it again.") from error
    if not isinstance(contents, dict):
        raise ModelError(f"{path} holds a {type(contents).__name__}: a JSON object is needed.")
    return contents


class _Slot:
    """One tensor in an open file; nothing is read until `tensor` is called."""

    def __init__(self, file: Any, name: str) -> None:
        self.file, self.name = file, name
        head = file.get_slice(name)
        self.shape, self.kind = tuple(head.get_shape()), str(head.get_dtype())

    def tensor(self) -> Tensor:
        tensor: Tensor = self.file.get_tensor(self.name)
        return tensor


def _open_tensors(folder: Path, files: ExitStack) -> dict[str, _Slot]:
    slots: dict[str, _Slot] = {}
    for path in _find_files(folder):
        try:
            file = files.enter_context(safe_open(path, framework="pt", device="cpu"))
            slots |= {name: _Slot(file, name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} is no whole safetensors file ({error}). It was probably cut off while "
                "it was downloaded or copied: fetch it again."
            ) from error
    return slots


def _find_files(folder: Path) -> list[Path]:
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        return _indexed_files(folder)
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise ModelError(
            f"{folder} has its weights in {pickled[0]} only. That is a pickle, which can run any "
            "code when it is opened, so it is refused; model*.safetensors is needed. Convert it "
            "once with transformers: AutoModelForCausalLM.from_pretrained(FOLDER)"
            ".save_pretrained(NEW_FOLDER) writes safetensors."
        )
    seen = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
    raise ModelError(
        f"A model's weights were asked for in {folder}: model*.safetensors is needed, and the "
        f"folder holds {seen}. Fetch the weights too."
    )


def _indexed_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map: fetch it again.")
    faults = []
    for name in sorted({str(name) for name in weight_map.values()}):
        # By name, not by where it leads: Hugging Face's cache keeps links to files elsewhere.
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            faults.append(f"{name!r}: allowed is the name of a .safetensors file in the folder")
        elif not (folder / name).is_file():
            faults.append(f"{name} is missing")
    if faults:
        heading = f"{index} names files that cannot be used:"
        raise ModelError(gather(faults, heading, "Fetch the whole folder again."))
    return [folder / name for name in sorted(set(weight_map.values()))]


def _match_names(model: Decoder, source: dict[str, _Slot], folder: Path) -> dict[str, _Slot]:
    """Return where each parameter of `model` lies in the files, all faults raised at once."""
    slots = _with_prefix(model, source)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    faults = []
    for name, shape in shapes.items():
        if name not in slots:
            faults.append(
                f"{name} {shape} is missing.{did_you_mean(name, set(slots) - set(shapes))}"
            )
            continue
        wanted = shape[::-1] if _is_transposed(model.config, name) else shape
        if slots[name].shape != wanted:
            faults.append(f"{name} is {slots[name].shape} in the file: config.json says {wanted}")
        elif slots[name].kind not in _FLOATS:
            kinds = ", ".join(sorted(_FLOATS))
            faults.append(f"{name} is of type {slots[name].kind}: allowed are {kinds}")
    for name in slots:
        is_spare_head = name == _HEAD and model.config.tie_word_embeddings
        if name not in shapes and not is_spare_head and not _NO_PARAMETERS.fullmatch(name):
            faults.append(f"{name} {slots[name].shape} is no tensor of this architecture")
    if faults:
        heading = f"{folder} does not hold the {model.config.family!r} model of its config.json:"
        advice = "Check that config.json and the weights belong together, and fetch both again."
        raise ModelError(gather(faults, heading, advice))
    return {name: slots[name] for name in shapes}


def _with_prefix(model: Decoder, source: Mapping[str, _Slot]) -> dict[str, _Slot]:
    """Return `source` under full names: some files (GPT-2's own) leave the trunk's name out."""
    prefix = f"{model.trunk_name}."
    if any(name.startswith(prefix) for name in source):
        return dict(source)
    return {name if name == _HEAD else prefix + name: slot for name, slot in source.items()}


def _is_transposed(config: DecoderConfig, name: str) -> bool:
    return config.block == "gpt2" and _CONV1D.fullmatch(name) is not None


def _read(
    config: DecoderConfig,
    places: Mapping[str, _Slot],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Iterator[tuple[str, Tensor]]:
    """Yield one parameter after the other, so that at most one is held twice."""
    for name, slot in places.items():
        tensor = slot.tensor()
        if _is_transposed(config, name):
            tensor = tensor.T.contiguous()  # (I, O) -> (O, I)
        yield name, tensor.to(device=device, dtype=dtype)


def _assign(model: Decoder, tensors: Iterator[tuple[str, Tensor]]) -> None:
    def unrounded() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if isinstance(module, Fp8Linear) and leaf == "weight":
                module.load(tensor, name)
            else:
                yield name, tensor

    assign_parameters(model, unrounded())


def _check_tied_head(model: Decoder, source: Mapping[str, _Slot], folder: Path) -> None:
    if not model.config.tie_word_embeddings or _HEAD not in source:
        return
    head, embedding = source[_HEAD].tensor(), model.lm_head.weight
    if head.shape != embedding.shape or not torch.equal(head.to(embedding), embedding):
        raise ModelError(
            f"{folder}: config.json says tie_word_embeddings=true, and {_HEAD} in the file is not "
            "the embedding. Set tie_word_embeddings to false to use the file's own head."
        )


def save_decoder(
    model: Decoder, folder: Path | str, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `model` into `folder` as config.json and safetensors that transformers loads.

    A tied head is written once. Every file is written beside its place and then moved there, so
    that a folder may be written over while a model is mapped from it. Raises ModelError if
    `model` has tensors that the format has no place for (LoRA that was not merged), and
    CheckpointError if the disk refuses.
    """
    folder = Path(folder)
    tensors = _tensors_to_save(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_decoder(model, tensors, folder, max_shard_bytes)
    except OSError as error:
        for part in folder.glob(".*.part"):
            part.unlink(missing_ok=True)
        raise disk_error(folder, error) from error


def _write_decoder(
    model: Decoder, tensors: dict[str, Tensor], folder: Path, max_shard_bytes: int
) -> None:
    shards = _split(tensors, max_shard_bytes)
    n = len(shards)
    names = [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)] if n > 1 else [_SINGLE]
    for file_name, shard in zip(names, shards, strict=True):
        ready = {name: _file_layout(model.config, name, tensors[name]) for name in shard}
        beside = folder / f".{file_name}.part"
        write_tensors(beside, ready, {"format": "pt"})
        os.replace(beside, folder / file_name)
    if n > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    # What an earlier save left under the other layout's name would be read instead of this one.
    (folder / (_SINGLE if n > 1 else _INDEX)).unlink(missing_ok=True)
    _write_json(folder / "config.json", _config_to_save(model))


def _tensors_to_save(model: Decoder) -> dict[str, Tensor]:
    if has_fp8_base(model):
        raise ModelError(
            "A model was to be saved whose linears are kept in fp8: the format has no place for "
            "their scales. Save its adapter; the base is where it was loaded from."
        )
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    expected = {name for name, _ in build_empty_decoder(model.config).named_parameters()}
    faults = [f"{name} has no place in the format" for name in tensors if name not in expected]
    faults += [f"{name} is missing" for name in expected - set(tensors)]
    if faults:
        heading = f"The model cannot be saved as a plain {model.config.family!r} model:"
        raise ModelError(gather(faults, heading, "Merge its LoRA first (merge_lora), or untie it."))
    return tensors


def _split(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[list[str]]:
    """Return the names in order, cut into shards of at most `max_shard_bytes` where possible."""
    shards: list[list[str]] = [[]]
    filled_bytes = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled_bytes + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(name)
        filled_bytes += tensor.nbytes
    return shards


def _file_layout(config: DecoderConfig, name: str, tensor: Tensor) -> Tensor:
    return (tensor.T if _is_transposed(config, name) else tensor).contiguous()


def _config_to_save(model: Decoder) -> dict[str, Any]:
    kind = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = {name: value for name, value in model.config.source.items() if name != "dtype"}
    architecture = FAMILIES[model.config.family].architecture
    return {**config, "architectures": [architecture], "torch_dtype": kind}


def _write_json(path: Path, contents: dict[str, Any]) -> None:
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)
