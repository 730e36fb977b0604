"""How much memory `lora merge` and `lora export` take beside the file that they write.

    python benchmarks/export_memory.py                                 # 150 million parameters
    python benchmarks/export_memory.py --hidden 896 --layers 24 --vocab 151936     # 0.5B

Prints a JSON line for each command and kind of adapter: the peak of resident memory above what the
imports take, the file's size, and their ratio, for a random bf16 model. CPU only. What is fully
trained is fp32 in the adapter, as training on a CPU writes it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lora.adapters.apply import apply_lora, train_token_rows
from lora.adapters.save_load import save_adapter
from lora.config import BaseWeights, LoRAConfig
from lora.data.tokenizers.subword import TextTokenizer
from lora.decoder.decoder import build_decoder
from lora.decoder.families import decoder_config
from lora.device import peak_memory_bytes, resident_bytes
from lora.export.chosen import choose_values
from lora.export.gguf import export_gguf
from lora.export.merged import write_merged
from lora.inference.loading import checked_ids, map_adapted
from lora.pretrained.hf_weights import load_decoder, save_decoder
from lora.pretrained.sources import find_model

RANK = 16
ADAPTERS: dict[str, dict[str, Any]] = {
    "linears": {},
    "head": {"targets": r".*(lm_head|mlp\..*)"},
    "new tokens": {},
    "embedding": {"modules_to_save": ("embed_tokens",)},
    "both tables": {"modules_to_save": ("embed_tokens", "lm_head")},
    "linears over nf4": {},
}
"""Kind of adapter -> settings of LoRA; "new tokens" trains 16 added rows too."""


def build_tokenizer() -> TextTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {word: number for number, word in enumerate(["</s>", *alphabet, "th"])}
    backend = Tokenizer(models.BPE(vocab, [("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return TextTokenizer(backend, eos_token="</s>", stop_ids=(0,))


def build_model(folder: Path, adapter: str, hidden: int, layers: int, vocab: int) -> None:
    """Write a random bf16 model of the Qwen 2 family, and an adapter for it, into `folder`."""
    config = {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": hidden * 5,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": 2,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
    }
    save_decoder(build_decoder(decoder_config(config), dtype=torch.bfloat16), folder / "base")
    build_tokenizer().save(folder / "base")
    base = BaseWeights(base_dtype="nf4" if adapter.endswith("nf4") else "auto")
    model = load_decoder(folder / "base", base=base)
    apply_lora(model, LoRAConfig(rank=RANK, init_seed=0, **ADAPTERS[adapter]))
    if adapter == "new tokens":
        train_token_rows(model, range(vocab - 8, vocab + 8))
    save_adapter(model, folder / "adapter")


def run_command(folder: Path, command: str, dtype: str) -> dict[str, float]:
    """Merge or export the model in `folder`, and return what that took."""
    tokenizer = build_tokenizer()
    before_bytes, start_s = resident_bytes(), time.perf_counter()
    source = find_model(str(folder / "base"))
    mapped = map_adapted(source, folder / "adapter")
    values = choose_values("auto", folder / "adapter", source.folder)
    if command == "merge":
        ids, out = checked_ids(mapped.model, tokenizer), folder / "out"
        write_merged(
            mapped, ids, base=source.folder, tokenizer=tokenizer, folder=out, values=values
        )
        size_bytes = (out / "model.safetensors").stat().st_size
    else:
        report = export_gguf(
            mapped,
            folder / "out.gguf",
            dtype,  # type: ignore[arg-type]
            tokenizer=tokenizer,
            rounded_as=values.rounded_as,
        )
        size_bytes = report.size_bytes
    peak_bytes = peak_memory_bytes(torch.device("cpu")) - before_bytes
    return {
        "file_mb": round(size_bytes / 1e6, 1),
        "peak_mb": round(peak_bytes / 1e6, 1),
        "peak_per_file": round(peak_bytes / size_bytes, 3),
        "wall_s": round(time.perf_counter() - start_s, 1),
    }


def measure(
    command: str, adapter: str, dtype: str, hidden: int, layers: int, vocab: int
) -> dict[str, float]:
    """Return what a command takes on a random model, each step in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        steps = ((build_model, (adapter, hidden, layers, vocab)), (run_command, (command, dtype)))
        for task, inputs in steps:
            # A new process each: the peak that the system reports is that of a process's life.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                result = pool.apply(task, (Path(folder), *inputs))
    return dict(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--command", choices=("merge", "export"), default=None)
    parser.add_argument("--adapter", choices=ADAPTERS, default=None)
    parser.add_argument("--dtype", default="f16", choices=("f16", "q8_0", "f32"), help="of GGUF")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=64_000)
    chosen = vars(parser.parse_args())
    command, adapter = chosen.pop("command"), chosen.pop("adapter")
    for one in [command] if command else ["merge", "export"]:
        for kind in [adapter] if adapter else ADAPTERS:
            case = {"command": one, "adapter": kind, **chosen}
            of_file = {} if one == "export" else {"dtype": "bf16"}  # the base's
            print(json.dumps({**case, **of_file, **measure(**case)}), flush=True)


if __name__ == "__main__":
    main()
