"""Check an adapter against vLLM's rules, and print the command that serves it.

faults = check_adapter_for_vllm("runs/mine/adapter")
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from torch import nn

from lora.adapters.peft_fields import check_fields
from lora.adapters.peft_files import read_adapter_files
from lora.adapters.peft_tensors import linear_shape
from lora.errors import AdapterError, did_you_mean, gather
from lora.export.vllm_architectures import Support, lora_support
from lora.layers.build import is_adaptable
from lora.pretrained.load.models import empty_language_model, model_config

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's --max-lora-rank may have; adapters up to that rank can be served."""
_VLLM_LINEARS = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("qkv_proj", "gate_up_proj"),  # Phi-3's, which its files and vLLM have as one
}
_VLLM_TABLES = {"lm_head", "embed_tokens"}
_VLLM_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>.+?)\."
    r"(lora_[AB]\.weight|lora_embedding_[AB])"
)
_TRAINED_TOKENS = ".token_adapter."  # refused by their config field, so not by name too
_VLLM_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
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
    "layer_replication": "repeated blocks are not supported. Save the full model with them",
    "trainable_token_indices": "trained tokens need a server started for them. Merge the adapter",
}


def check_adapter_for_vllm(folder: Path | str, base: Path | None = None) -> list[str]:
    """Return every reason why vLLM cannot serve the adapter in `folder`, and what to do about it.

    Architecture, names and shapes are those of the model in the directory `base`, if one is given.
    An empty list means that vLLM accepts it, started as `vllm_command` says. Raises AdapterError if
    no adapter can be read, and ModelError if `base` is not a model that we know. Source: vLLM's
    PEFTHelper, LoRAConfig and LoRAModel.
    """
    files = read_adapter_files(Path(folder))
    described, wrong = _valid_fields(files.described)
    faults = files.faults + wrong
    for key, why in _VLLM_REFUSES.items():
        if described.get(key):
            faults.append(f"{key}={described[key]!r}: {why}.")
    if described.get("bias", "none") != "none":
        faults.append(f"bias={described['bias']!r}: only 'none' is supported. Merge the adapter.")
    init = described.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _VLLM_INITS:
        faults.append(
            f"init_lora_weights={init!r}: this initialization changes the base's weights. Convert "
            "the adapter with PEFT: save_pretrained with path_initial_model_for_weight_conversion."
        )
    saved = described.get("modules_to_save") or []
    if set(saved) - {"classifier", "score"}:
        faults.append(
            f"modules_to_save={saved!r}: fully trained modules are not supported. Merge the "
            "adapter into the model and serve that."
        )
    faults += _rank_faults(described)
    takes_all = False
    if base is not None:
        name, support = lora_support(base)
        takes_all = support == "yes"
        faults += _architecture_faults(name, support)
        shapes = {name: tuple(tensor.shape) for name, tensor in files.tensors.items()}
        faults += _base_faults(shapes, base)
    return faults + _tensor_faults(list(files.tensors), saved, takes_all=takes_all)


def find_base(folder: Path | str) -> Path | None:
    """Return the directory on this disk that the adapter names as its base; None if it has none."""
    name = read_adapter_files(Path(folder)).described.get("base_model_name_or_path")
    base = Path(name) if isinstance(name, str) and name else None
    return base if base is not None and (base / "config.json").is_file() else None


def _architecture_faults(name: str, support: Support) -> list[str]:
    if support == "yes":
        return []
    why = (
        "serves it without adapters"
        if support == "no"
        else "is not known to serve it with adapters"
    )
    return [f"the base is a {name}: vLLM {why}. Merge the adapter into the model and serve that."]


def _base_faults(shapes: dict[str, tuple[int, ...]], base: Path) -> list[str]:
    """Return where A (R, I) and B (O, R) do not fit a weight (O, I) of the model in `base`."""
    weights = _weight_shapes(base)
    unknown, faults = {}, []
    for name, shape in shapes.items():
        found = _VLLM_TENSOR.fullmatch(name)
        if found is None:
            continue
        weight = weights.get(found["module"])
        if weight is None:
            unknown[found["module"]] = did_you_mean(found["module"], weights)
        elif name.endswith((".lora_A.weight", ".lora_B.weight")) and len(shape) == 2:
            is_a = name.endswith(".lora_A.weight")
            seen, wanted = (shape[1], weight[1]) if is_a else (shape[0], weight[0])
            if seen != wanted:
                side = "inputs" if is_a else "outputs"
                faults.append(f"{name} is for {seen} {side}, the base's layer has {wanted}.")
    if unknown:
        first, near = next(iter(unknown.items()))
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        faults.append(
            f"{first}{more}: {base} has no such layer.{near} Name the adapter's own base."
        )
    return faults


def _weight_shapes(base: Path) -> dict[str, tuple[int, int]]:
    model = empty_language_model(model_config(base))
    return {
        name: (module.num_embeddings, module.embedding_dim)
        if isinstance(module, nn.Embedding)
        else linear_shape(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or is_adaptable(module)
    }


def _valid_fields(described: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the fields without those that are invalid, and a fault for each of these."""
    read = {"peft_type": "LORA", **{key: described.get(key) for key in _VLLM_READS}}
    if described.get("peft_type") is not None:
        read["peft_type"] = described["peft_type"]
    faults = check_fields(read)
    wrong = {fault.partition("=")[0] for fault in faults}
    valid = {key: value for key, value in described.items() if key not in wrong}
    return valid, [f"{fault}. Save the adapter again." for fault in faults]


def _rank_faults(described: dict[str, Any]) -> list[str]:
    faults = []
    rank = _highest_rank(described)
    if rank is not None and rank > VLLM_RANKS[-1]:
        faults.append(f"rank {rank}: at most {VLLM_RANKS[-1]} is supported. Train a smaller one.")
    for key in ("rank_pattern", "alpha_pattern"):
        if described.get(key):
            faults.append(
                f"{key}={described[key]!r}: most releases of vLLM silently ignore it and scale "
                "every layer by lora_alpha / r. Train with one rank and alpha, or merge."
            )
    return faults


def _tensor_faults(names: list[str], saved: list[str], *, takes_all: bool) -> list[str]:
    modules, unknown = set(), []
    for name in names:
        found = _VLLM_TENSOR.fullmatch(name)
        if found is not None:
            modules.add(found["module"].rpartition(".")[2])
        elif _TRAINED_TOKENS not in name and not any(f".{module}." in name for module in saved):
            unknown.append(name)
    faults = []
    if unknown:
        shown = f"{', '.join(unknown[:3])}{' …' if len(unknown) > 3 else ''}"
        faults.append(f"{shown}: only lora_A and lora_B are read. Save the adapter without them.")
    tables = sorted(modules & _VLLM_TABLES)
    if tables:
        faults.append(
            f"{', '.join(tables)} adapted: vLLM supports that for some architectures only, such as "
            "Llama. Leave them out of targets, or merge the adapter into the model."
        )
    others = sorted(modules - _VLLM_TABLES - _VLLM_LINEARS)
    if others and not takes_all:
        faults.append(
            f"{', '.join(others)} adapted: of Llama-like models vLLM adapts "
            f"{', '.join(sorted(_VLLM_LINEARS))}. Merge the adapter into the model."
        )
    return faults


def _highest_rank(described: dict[str, Any]) -> int | None:
    """Return the highest rank in valid fields; None if `r` was not valid."""
    ranks = [described.get("r"), *(described.get("rank_pattern") or {}).values()]
    return None if ranks[0] is None else max(ranks)


def vllm_command(folder: Path | str, base: str, name: str | None = None) -> str:
    """Return the command that serves the adapter in `folder` on the model `base` with vLLM.

    It passes the smallest --max-lora-rank that fits: vLLM's default of 16 refuses larger ranks.
    Raises AdapterError if there is no adapter, or its config has no valid rank.
    """
    folder = Path(folder)
    described, faults = _valid_fields(read_adapter_files(folder).described)
    rank = _highest_rank(described)
    if rank is None:
        raise AdapterError(gather(faults, f"Cannot serve {folder}:", "Name another adapter."))
    max_rank = next((n for n in VLLM_RANKS if n >= rank), VLLM_RANKS[-1])
    adapter = shlex.quote(f"{name or folder.resolve().name}={folder}")
    return (
        f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {max_rank} "
        f"--lora-modules {adapter}"
    )
