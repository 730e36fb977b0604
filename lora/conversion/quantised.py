"""Rules for keys that quantise the base: bitsandbytes' 4 and 8 bits, torchao's nf4.

What a file's run would have used is what the converted one gets: bitsandbytes' nf4 has the same
values here, with or without double quantisation. Where anything differs, a note says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora.config import NF4_BLOCKS
from lora.conversion.convert import Keys, Outcome, Rule, is_off, is_on
from lora.settings.peers import NO_FP4, NO_GPTQ, NO_OUTLIERS

_IS_4_BIT = "the model's weights are in 4 bits already: they are loaded as they are"
_TORCHAO = "torchao's nf4 has the same blocks and levels; its scales are rounded otherwise"
_NOT_QUANTISED = "nothing is quantised"


def load_in_4bit(value: Any, keys: Keys) -> Outcome:
    """Rule of the switch for nf4, as transformers and axolotl have it."""
    if is_off(value):
        return Outcome(note="off there and here")
    of_lora = keys.get("adapter") == "lora"
    return nf4(keys, "axolotl takes nf4 with adapter: qlora alone" if of_lora else "")


def load_in_8bit(value: Any, keys: Keys) -> Outcome:
    """Rule of the switch for LLM.int8()."""
    if is_off(value):
        return Outcome(note="off there and here")
    if is_on(keys.get("load_in_4bit")) or keys.get("adapter") == "qlora":
        return Outcome(
            missing={"": "the base is quantised once: to 4 bits, which the file has too"}
        )
    return int8(keys)


def nf4(keys: Keys, note: str = "") -> Outcome:
    """Return what training over nf4 is here."""
    if is_quantised(keys):
        return Outcome(note=_IS_4_BIT)
    return Outcome({"base_dtype": "nf4"}, note)


def int8(keys: Keys) -> Outcome:
    """Return what training over 8 bits of bitsandbytes is here."""
    return Outcome({"base_dtype": "int8"}, _plain(NO_OUTLIERS))


def is_quantised(keys: Keys) -> bool:
    """Whether the name of a file's model says that its weights are bitsandbytes' 4 bits."""
    names = ("base_model", "model_name_or_path", "model_name")
    return any(str(keys.get(name, "")).rstrip("/").lower().endswith("bnb-4bit") for name in names)


def quantisation_of(settings: Keys, keys: Keys, *, is_4_bit: bool) -> Outcome:
    """Return what bitsandbytes' own settings (BitsAndBytesConfig) are here.

    `settings` are some of them by name, and `keys` all of the file; without `is_4_bit` those of
    nf4 have no use.
    """
    found: dict[str, str] = {}
    lost: dict[str, str] = {}
    for name, value in settings.items():
        if name == "bnb_4bit_use_double_quant" and is_off(value) and is_4_bit:
            if not is_quantised(keys):  # else the folder says it
                found["nf4_double_quant"] = "false"
        elif name == "bnb_4bit_quant_type" and str(value).lower() != "nf4" and is_4_bit:
            lost[f".{name}"] = _plain(NO_FP4)
        elif name.startswith("llm_int8_skip_modules") and not is_off(value):
            lost[f".{name}"] = "all linears of the blocks are quantised, and no others"
        elif not name.startswith(("bnb_4bit_", "llm_int8_", "load_in_")):
            lost[f".{name}"] = "not known to this converter"
    note = "" if found else "as here" if is_4_bit else _NOT_QUANTISED
    return Outcome(found, note, lost)


def double_quantisation(is_4_bit: bool) -> Rule:
    """Return the rule of the switch for double quantisation, where the base is in nf4 or not."""

    def rule(value: Any, keys: Keys) -> Outcome:
        return quantisation_of({"bnb_4bit_use_double_quant": value}, keys, is_4_bit=is_4_bit)

    return rule


def bits(value: Any, keys: Keys) -> Outcome:
    """Rule of LLaMA-Factory's quantization_bit."""
    if str(value) == "4":
        return nf4(keys)
    if str(value) == "8":
        return int8(keys)
    return Outcome(missing={"": "base_dtype has 4 bits (nf4) and 8 (int8, fp8)"})


def bits_method(value: Any, keys: Keys) -> Outcome:
    """Rule of LLaMA-Factory's quantization_method."""
    if is_off(keys.get("quantization_bit")):
        return Outcome(note=_NOT_QUANTISED)
    if str(value).lower() in ("bitsandbytes", "bnb"):
        return Outcome(note="nf4 is bitsandbytes', value by value")
    why = f"there is no {value}: base_dtype quantises to bitsandbytes' nf4, or to int8"
    return Outcome(missing={"": why})


def bits_type(value: Any, keys: Keys) -> Outcome:
    """Rule of LLaMA-Factory's quantization_type."""
    is_4_bit = str(keys.get("quantization_bit")) == "4"
    if not is_4_bit or str(value).lower() == "nf4":
        return Outcome(note="nf4 is what there is" if is_4_bit else _NOT_QUANTISED)
    return Outcome(missing={"": _plain(NO_FP4)})


def bits_double(value: Any, keys: Keys) -> Outcome:
    """Rule of LLaMA-Factory's double_quantization, which is on by default there and here."""
    return double_quantisation(str(keys.get("quantization_bit")) == "4")(value, keys)


def axolotl_kwargs(value: Any, keys: Keys) -> Outcome:
    """Rule of axolotl's bnb_config_kwargs; its own defaults are nf4 with double quantisation."""
    settings = value if isinstance(value, Mapping) else {}
    is_4_bit = is_on(keys.get("load_in_4bit")) or keys.get("adapter") == "qlora"
    return quantisation_of(settings, keys, is_4_bit=is_4_bit)


def axolotl_double(value: Any, keys: Keys) -> Outcome:
    """Rule of axolotl's bnb_4bit_use_double_quant."""
    return axolotl_kwargs({"bnb_4bit_use_double_quant": value}, keys)


def axolotl_peft(value: Any, keys: Keys) -> Outcome:
    """Rule of axolotl's mapping `peft`: a backend, and a dtype of the base."""
    settings = dict(value) if isinstance(value, Mapping) else {}
    backend, dtype = settings.pop("backend", None), settings.pop("weight_dtype", None)
    group = settings.pop("group_size", None) if dtype == "nf4" else None
    lost = {f".{name}": "has no equivalent here" for name, v in settings.items() if not is_off(v)}
    if dtype == "nf4":
        found = nf4(keys, _TORCHAO if backend == "torchao" else "")
        own = {"nf4_block": str(group)} if group is not None and found.settings else {}
        if own and own["nf4_block"] not in map(str, NF4_BLOCKS):
            own, lost[".group_size"] = {}, f"nf4_block is one of {', '.join(map(str, NF4_BLOCKS))}"
        return Outcome({**found.settings, **own}, found.note, lost)
    if dtype == "int8":
        return Outcome(int8(keys).settings, _plain(NO_OUTLIERS), lost)
    if dtype is not None:
        lost[".weight_dtype"] = f"there is no {dtype}: base_dtype is nf4, int8 or fp8"
    return Outcome(note="" if lost else _NOT_QUANTISED, missing=lost)


def gptq(value: Any, keys: Keys) -> Outcome:
    """Rule of the switch for weights in GPTQ."""
    if is_off(value):
        return Outcome(note="off there and here")
    return Outcome(missing={"": _plain(NO_GPTQ)})


def quantize_base(value: Any, keys: Keys) -> Outcome:
    """Rule of torchtune's switch for nf4."""
    return Outcome(note="off there and here") if is_off(value) else nf4(keys, _TORCHAO)


def _plain(text: str) -> str:
    return text.replace("`", "")
