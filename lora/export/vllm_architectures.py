"""Which architectures vLLM serves with adapters. Source: its page of supported models.

For these vLLM adapts every linear of a block, under the names that transformers has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lora.decoder.families import FAMILIES
from lora.pretrained.hf_files import read_config

_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
WITH_LORA = frozenset(
    {
        *("afmoe", "apertus", "arcee", "bamba", "cohere", "cohere2", "deepseekv2", "deepseekv3"),
        *("ernie4_5", "ernie4_5_moe", "exaone4", "falconh1", "gemma", "gemma2", "gemma3", "glm"),
        *("glm4", "glm4moe", "gptbigcode", "gptoss", "granite", "granitemoe", "granitemoehybrid"),
        *("granitemoeshared", "hunyuandensev1", "hunyuanmoev1", "jamba", "lfm2", "lfm2moe"),
        *("llama", "llama4", "longcatflash", "mistral", "mixtral", "nemotron", "nemotronh"),
        *("olmo", "olmo2", "olmo3", "opt", "phi", "phi3", "phimoe", "qwen2", "qwen2moe", "qwen3"),
        *("qwen3moe", "qwen3next", "seedoss", "smollm3"),
    }
)
"""Class names of transformers without their ending, in lower case."""
WITHOUT_LORA = frozenset(
    {
        *("bloom", "dbrx", "dots1", "exaonemoe", "falcon", "falconmamba", "flexolmo", "gemma3n"),
        *("gpt2", "gptj", "gptneox", "jais2", "mamba", "mamba2", "minimax", "mpt", "olmoe"),
        *("persimmon", "stablelm", "starcoder2", "zamba2"),
    }
)
"""Architectures that vLLM serves, but without adapters."""

Support = Literal["yes", "no", "unknown"]


def lora_support(base: Path) -> tuple[str, Support]:
    """Return the architecture of the model in the directory `base`, and whether it takes adapters.

    Raises ModelError for a directory without a config.json.
    """
    name = _architecture(base)
    short = next((name.removesuffix(end) for end in _ENDINGS if name.endswith(end)), name).lower()
    if short in WITH_LORA:
        return name, "yes"
    return name, "no" if short in WITHOUT_LORA else "unknown"


def _architecture(base: Path) -> str:
    config = read_config(base)
    named, family = config.get("architectures"), config.get("model_type")
    if isinstance(named, list) and named:
        return str(named[0])
    known = FAMILIES.get(family) if isinstance(family, str) else None
    return str(family) if known is None else known.architecture
