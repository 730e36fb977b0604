"""Which quantised folders load: bitsandbytes' nf4. Every other method is refused by its name.

A method is read from config.json, or from the names of the tensors where that is silent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora.errors import ModelError

SETTINGS_KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys of config.json with the settings of a quantisation: transformers', that of early
compressed-tensors files, and mlx-lm's."""
BITSANDBYTES = "bitsandbytes"


@dataclass(frozen=True)
class Method:
    """A way to quantise weights that is not read here."""

    name: str
    """As its authors write it."""
    like: str = "nf4"
    """The `base_dtype` that stores the unquantised model at about its size."""


LLM_INT8 = Method("bitsandbytes in 8 bits, LLM.int8()", "int8")
FP4 = Method("bitsandbytes in fp4")
_MXFP4 = Method("MXFP4")
_MLX = Method("mlx-lm")
_COMPRESSED = Method("compressed-tensors")
_FP8 = Method("FP8 in blocks, as DeepSeek and Qwen publish", "fp8")
METHODS: dict[str, Method] = {
    "gptq": Method("GPTQ"),
    "awq": Method("AWQ"),
    "auto-round": Method("AutoRound"),
    "autoround": Method("AutoRound"),
    "intel/auto-round": Method("AutoRound"),
    "aqlm": Method("AQLM"),
    "hqq": Method("HQQ"),
    "vptq": Method("VPTQ"),
    "quip": Method("QuIP#"),
    "spqr": Method("SpQR"),
    "higgs": Method("HIGGS"),
    "quanto": Method("Quanto"),
    "eetq": Method("EETQ", "int8"),
    "torchao": Method("torchao"),
    "bitnet": Method("BitNet"),
    "exl2": Method("ExLlamaV2"),
    "exl3": Method("ExLlamaV3"),
    "quark": Method("Quark"),
    "modelopt": Method("ModelOpt"),
    "sinq": Method("SINQ"),
    "fp_quant": Method("FP-Quant"),
    "fouroversix": Method("Four Over Six"),
    "compressed-tensors": _COMPRESSED,
    "sparseml": _COMPRESSED,
    "mxfp4": _MXFP4,
    "mxfp8": Method("MXFP8", "fp8"),
    "nvfp4": Method("NVFP4"),
    "fp8": _FP8,
    "fbgemm_fp8": Method("FBGEMM FP8", "fp8"),
    "mlx": _MLX,
}
"""By `quant_method` in config.json, in lower case."""

_TENSORS: tuple[tuple[re.Pattern[str], Method], ...] = (
    (re.compile(r"\.SCB$"), LLM_INT8),
    (re.compile(r"\.quant_state\.bitsandbytes__fp4$"), FP4),
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), Method("GPTQ or AWQ")),
    (re.compile(r"\.weight_(packed|zero_point|shape)$"), _COMPRESSED),
    (re.compile(r"\.weight_scale_inv$"), _FP8),
    (re.compile(r"_proj_(blocks|scales)$"), _MXFP4),
    (re.compile(r"\.(codebooks|codes)$"), METHODS["aqlm"]),
    (re.compile(r"\.W_q$"), METHODS["hqq"]),
    (re.compile(r"\.q_(weight|scale|invperm|groups)$"), METHODS["exl2"]),
    (re.compile(r"\.(trellis|suh|svh)$"), METHODS["exl3"]),
    (re.compile(r"\.weight\._(data|scale)$"), METHODS["quanto"]),
    (re.compile(r"\.(scales|biases)$"), _MLX),
    (re.compile(r"\.weight_scale$"), Method("FP8 with one scale a tensor or row", "fp8")),
)
"""By the names of tensors that only this method writes; the first that matches counts."""


def settings_of(config: Mapping[str, Any]) -> Any:
    """Return the settings of the quantisation in a config.json; None if there are none.

    A multimodal model may have them among those of its text part.
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in SETTINGS_KEYS:
            if part.get(key) is not None:
                return part[key]
    return None


def without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of a config.json without what says how weights are quantised."""
    kept = {name: value for name, value in config.items() if name not in SETTINGS_KEYS}
    text = kept.get("text_config")
    if isinstance(text, Mapping):
        kept["text_config"] = {n: v for n, v in text.items() if n not in SETTINGS_KEYS}
    return kept


def is_4bit(config: Mapping[str, Any], described: str) -> bool:
    """Whether a config.json says that weights are in bitsandbytes' nf4; False: not quantised.

    `described` is the model in words. Raises ModelError by name for every other method.
    """
    settings = settings_of(config)
    if settings is None:
        return False
    if not isinstance(settings, Mapping):
        raise ModelError(
            f"Cannot load this {described}: quantization_config in config.json is a "
            f"{type(settings).__name__}, and a JSON object is needed. Download it again."
        )
    method = _method_in(settings)
    if method is not None:
        raise ModelError(refusal(f"this {described}", method, "quantization_config in config.json"))
    return True


def refuse_tensors(names: Iterable[str], what: str) -> None:
    """Raise ModelError by name if tensors called `names` are those of a quantised model.

    bitsandbytes' nf4 is not. `what` is the folder.
    """
    listed = list(names)
    for pattern, method in _TENSORS:
        found = next((name for name in listed if pattern.search(name)), None)
        if found is not None:
            raise ModelError(refusal(what, method, f"it has a tensor {found}"))


def refusal(what: str, method: Method, seen: str) -> str:
    """Return the message for weights quantised by `method`, which `seen` says."""
    return (
        f"Cannot load {what}: its weights are quantised by {method.name} ({seen}). Allowed: "
        "unquantised weights, and nf4 of bitsandbytes (…-bnb-4bit). Name the unquantised model: "
        f"--base-dtype {method.like} stores it at about this size as it is read. Or name a GGUF "
        "file of a native architecture."
    )


def _method_in(settings: Mapping[str, Any]) -> Method | None:
    """Return the method of a config.json's settings; None for bitsandbytes' nf4."""
    named = settings.get("quant_method")
    name = named.lower() if isinstance(named, str) else None
    if name is None and _is_of_bitsandbytes(settings):  # files of 2023 do not name the method
        name = BITSANDBYTES
    if name is None and {"bits", "group_size"} <= set(settings):
        name = "mlx" if "desc_act" not in settings and "zero_point" not in settings else "gptq"
    if name in (BITSANDBYTES, "bitsandbytes_4bit", "bitsandbytes_8bit"):
        if _flag(settings, "load_in_8bit") or name == "bitsandbytes_8bit":
            return LLM_INT8
        kind = settings.get("bnb_4bit_quant_type")  # where it is missing the tensors tell
        return None if kind in ("nf4", None) else Method(f"bitsandbytes in {kind}")
    if name is None:
        return Method("a method that config.json does not name (no quant_method)")
    known = METHODS.get(name, Method(str(named)))
    return Method(known.name, _like(settings, known))


def _is_of_bitsandbytes(settings: Mapping[str, Any]) -> bool:
    return any(key.lstrip("_").startswith(("load_in_", "bnb_4bit_")) for key in settings)


def _flag(settings: Mapping[str, Any], name: str) -> bool:
    """Whether a setting is true under its name, or under the one that transformers 4.37 wrote."""
    return settings.get(name) is True or settings.get(f"_{name}") is True


def _like(settings: Mapping[str, Any], method: Method) -> str:
    """Return the base_dtype that is nearest in size to these settings of `method`."""
    text = str(settings.get("format", "")) + str(settings.get("quant_algo", ""))
    if "float-quantized" in text or text.lower() == "fp8":
        return "fp8"
    return "int8" if settings.get("bits") == 8 or "int-quantized" in text else method.like
