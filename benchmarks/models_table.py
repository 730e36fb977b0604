"""What works for each architecture, found out on tiny random models: the table of docs/models.md.

    python benchmarks/models_table.py                            # print the table, 20 s
    python benchmarks/models_table.py --only llama mamba         # some of its rows
    python benchmarks/models_table.py --write docs/models.md     # replace the table in the page

Each row builds a model of two blocks, every tensor random (tests/pretrained/tiny_models.py), saves
it, loads it as a command would, and asks the code what it does with it. Nothing is written by hand
but the names of published models. Logits are compared with transformers', one-step gradients with
PEFT's, and a row whose numbers disagree is an error.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from lora.adapters.apply import apply_lora, lora_layers, remove_lora
from lora.config import LoRAConfig
from lora.decoder.decoder import Decoder
from lora.decoder.language_model import LanguageModel, ModelConfig
from lora.errors import LoraError, ModelError
from lora.export.vllm_architectures import lora_support
from lora.fast.why_not import why_not_captured, why_not_hand_written
from lora.pretrained.gguf_writer import describe_decoder
from lora.pretrained.load.implementation import choose_implementation
from lora.pretrained.load.models import load_language_model, why_not_packed
from lora.stacked.apply import apply_stacked, remove_stacked
from tests.pretrained.tiny_models import VOCAB, model_type_of, tiny_transformers

START, END = "<!-- models_table.py: begin -->", "<!-- models_table.py: end -->"
TOLERANCE = 1e-5
"""‖difference‖ / ‖reference‖ of logits and of each gradient, in fp32."""
HEADINGS = (
    *("models", "`model_type`", "implementation", "packing", "step on a GPU", "sweep", "export"),
    "adapter in vLLM",
    *("linears of `all-linear`", "equal to transformers' and PEFT's"),
)
NAMES = {
    "llama": "Llama 2 and 3, SmolLM, SmolLM2, Yi, TinyLlama",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "mistral": "Mistral",
    "smollm3": "SmolLM3",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "phi3": "Phi-3, Phi-3.5, Phi-4",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "granite": "Granite 3",
    "cohere": "Command R",
    "cohere2": "Command R7B",
    "glm4": "GLM-4",
    "stablelm": "StableLM",
    "starcoder2": "StarCoder 2",
    "phi": "Phi-1, Phi-2",
    "nemotron": "Nemotron",
    "exaone4": "EXAONE 4",
    "gpt2": "GPT-2",
    "gpt_bigcode": "StarCoder, SantaCoder",
    "gptj": "GPT-J",
    "codegen": "CodeGen",
    "gpt_neo": "GPT-Neo",
    "gpt_neox": "GPT-NeoX, Pythia",
    "opt": "OPT",
    "bloom": "BLOOM",
    "mpt": "MPT",
    "falcon": "Falcon 40B, 180B",
    "falcon-multi-query": "Falcon 7B",
    "falcon-alibi": "Falcon RW",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3 MoE",
    "gpt_oss": "gpt-oss",
    "llama4_text": "Llama 4 (text)",
    "mamba": "Mamba",
    "ernie4_5": "ERNIE 4.5",
    "seed_oss": "Seed-OSS",
    "hunyuan_v1_dense": "Hunyuan",
    "apertus": "Apertus",
    "arcee": "Arcee AFM",
    "helium": "Helium",
    "vaultgemma": "VaultGemma",
    "persimmon": "Persimmon",
    "biogpt": "BioGPT",
    "xglm": "XGLM",
    "qwen2_moe": "Qwen1.5 and Qwen2 MoE",
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3",
    "glm4_moe": "GLM-4.5",
    "ernie4_5_moe": "ERNIE 4.5 MoE",
    "olmoe": "OLMoE",
    "phimoe": "Phi-3.5-MoE",
    "granitemoe": "Granite 3 MoE",
    "qwen3_next": "Qwen3-Next",
    "minimax": "MiniMax",
    "lfm2": "LFM2",
    "granitemoehybrid": "Granite 4",
    "bamba": "Bamba",
    "falcon_h1": "Falcon-H1",
    "jamba": "Jamba",
    "nemotron_h": "Nemotron-H",
    "recurrent_gemma": "RecurrentGemma",
    "mamba2": "Mamba 2",
    "falcon_mamba": "Falcon Mamba",
    "rwkv": "RWKV-4",
}
"""Published models by the names of tiny ones; a variant that is none of these has no row."""
PUBLISHED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},  # since version 0.2
    "smollm3": {"no_rope_layer_interval": 4, "num_hidden_layers": 4},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16},
}
"""Settings as published models have them, where tiny ones differ and a GGUF file knows no other."""


def main() -> int:
    """Print the table, or put it into the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--write", type=Path, help="the page in which the table is replaced")
    arguments = parser.parse_args()
    if arguments.write is not None and len(arguments.only) < len(NAMES):
        parser.error("--write needs all rows: leave --only out")
    table = make_table(arguments.only)
    if arguments.write is None:
        print(table)
    else:
        page = arguments.write.read_text(encoding="utf-8")
        arguments.write.write_text(with_table(page, table), encoding="utf-8")
    return 0


def with_table(page: str, table: str) -> str:
    """Return the text of `page` with `table` between its marks."""
    pattern = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.S)
    if not pattern.search(page):
        raise ValueError(f"no {START} … {END} in the page")
    return pattern.sub(lambda _: f"{START}\n{table}\n{END}", page)


def make_table(names: Iterable[str]) -> str:
    """Return the table in Markdown, one row for each of `names`."""
    rows = [HEADINGS, tuple("---" for _ in HEADINGS), *(row_of(name) for name in names)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def row_of(name: str) -> tuple[str, ...]:
    """Return the cells of one architecture. Raises ModelError if its numbers are not PEFT's."""
    theirs = tiny_transformers(name, **PUBLISHED.get(name, {}))
    with tempfile.TemporaryDirectory(prefix="lora-models-") as folder:
        theirs.save_pretrained(folder)
        chosen = choose_implementation(theirs.config.to_dict())
        model = load_language_model(Path(folder), implementation=chosen.kind)
        vllm = lora_support(Path(folder))[1]
    linears = _adapted_linears(model)
    return (
        NAMES[name],
        f"`{model_type_of(name)}`",
        chosen.kind,
        _packing(model.config),
        _step(model),
        _sweep(model),
        _export(model),
        "not known" if vllm == "unknown" else vllm,
        ", ".join(f"`{linear}`" for linear in linears),
        _compare(model, theirs),
    )


def _packing(config: ModelConfig) -> str:
    reason = why_not_packed(config)
    narrow = why_not_packed(config, torch.bfloat16)
    if reason is not None:
        return f"no: {reason}"
    return "yes" if narrow is None else f"in fp32; not in bf16: {narrow}"


def _adapted_linears(model: LanguageModel) -> list[str]:
    apply_lora(model, LoRAConfig(rank=2, init_seed=0))
    endings = [name.rpartition(".")[2] for name in lora_layers(model)]
    remove_lora(model)
    return list(dict.fromkeys(endings))


def _step(model: LanguageModel) -> str:
    apply_lora(model, LoRAConfig(rank=2, init_seed=0))
    why_not = None
    if isinstance(model, Decoder):
        why_not = why_not_hand_written(model)
        step = "hand-written" if why_not is None else "captured"
    else:
        step = "captured" if why_not_captured(model) is None else "plain"
    remove_lora(model)
    return step if why_not is None else f"{step}: {why_not}"


def _sweep(model: LanguageModel) -> str:
    configs = [LoRAConfig(rank=rank, init_seed=rank) for rank in (2, 3)]
    try:
        remove_stacked(model, apply_stacked(model, configs, (1, 2)))
    except LoraError as error:
        return "if its dropout is 0" if "dropout" in str(error) else "no"
    return "yes"


def _export(model: LanguageModel) -> str:
    if not isinstance(model, Decoder):
        return "directory"
    try:
        describe_decoder(model.config)
    except ModelError:
        return "directory"
    return "directory, GGUF"


def _compare(model: LanguageModel, theirs: nn.Module) -> str:
    """Return what was equal. Raises ModelError for what was not."""
    import peft

    ids = torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        _check(model(ids), cast(Any, theirs)(ids).logits, "logits")
    apply_lora(model, LoRAConfig(rank=2, alpha=4, init_seed=0))
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=list(lora_layers(model)), task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT: settings of transformers, layouts of Conv1D
        other = cast(Any, peft.get_peft_model(cast(Any, theirs), config)).eval()
    named, draw = dict(other.named_parameters()), torch.Generator().manual_seed(6)
    pairs: list[tuple[str, nn.Parameter, nn.Parameter]] = []
    for name, layer in lora_layers(model.eval()).items():
        for side in ("lora_A", "lora_B"):
            own = layer.get_parameter(side)
            pairs.append((name, own, named[f"base_model.model.{name}.{side}.default.weight"]))
    with torch.no_grad():
        for _, own, same in pairs:
            own.copy_(torch.randn(own.shape, generator=draw) * 0.1)
            same.copy_(own)
    model(ids).log_softmax(-1)[..., 0].sum().backward()
    other(input_ids=ids, use_cache=False).logits.log_softmax(-1)[..., 0].sum().backward()
    for name, own, same in pairs:
        _check(cast(Tensor, own.grad), cast(Tensor, same.grad), f"the gradient of {name}")
    return "logits, gradients"


def _check(found: Tensor, wanted: Tensor, what: str) -> None:
    error = ((found - wanted).norm() / wanted.norm()).item()
    if not error <= TOLERANCE:
        raise ModelError(f"{what}: the relative difference is {error:.1e}")


if __name__ == "__main__":
    sys.exit(main())
