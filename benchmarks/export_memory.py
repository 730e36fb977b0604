"""How much memory `lora export` and the file that it writes take, on a random model.

    python benchmarks/export_memory.py                                 # 150 million parameters
    python benchmarks/export_memory.py --hidden 896 --layers 24 --vocab 151936     # 0.5B

Prints one JSON line: the peak of resident memory above what the imports take, the file's size, and
their ratio, for a bf16 model with LoRA on all linears of its blocks. CPU only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lora.adapters.apply import apply_lora
from lora.config import LoRAConfig
from lora.data.tokenizers.subword import TextTokenizer
from lora.decoder.decoder import build_decoder
from lora.decoder.families import decoder_config
from lora.device import resident_bytes
from lora.export.gguf import export_gguf
from lora.pretrained.hf_weights import map_decoder, save_decoder

RANK = 16


def build_tokenizer() -> TextTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {word: number for number, word in enumerate(["</s>", *alphabet, "th"])}
    backend = Tokenizer(models.BPE(vocab, [("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return TextTokenizer(backend, eos_token="</s>", stop_ids=(0,))


def build_model(folder: Path, hidden: int, layers: int, vocab: int) -> None:
    """Write a random bf16 model of the Qwen 2 family into `folder`."""
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
    save_decoder(build_decoder(decoder_config(config), dtype=torch.bfloat16), folder)


def export_model(folder: Path, dtype: str) -> dict[str, float]:
    """Export the model in `folder`, with LoRA on it, and return what that took."""
    tokenizer = build_tokenizer()
    before_bytes, start_s = resident_bytes(), time.perf_counter()
    mapped = map_decoder(folder)
    apply_lora(mapped.model, LoRAConfig(rank=RANK, init_seed=0))
    report = export_gguf(mapped, folder / "out.gguf", dtype, tokenizer=tokenizer)  # type: ignore[arg-type]
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before_bytes
    return {
        "file_mb": round(report.size_bytes / 1e6, 1),
        "peak_mb": round(peak_bytes / 1e6, 1),
        "peak_per_file": round(peak_bytes / report.size_bytes, 3),
        "export_s": round(time.perf_counter() - start_s, 1),
    }


def measure(dtype: str, hidden: int, layers: int, vocab: int) -> dict[str, float]:
    """Return what the export of a random model takes, each step in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        for task, inputs in ((build_model, (hidden, layers, vocab)), (export_model, (dtype,))):
            # A new process each: the peak that the system reports is that of a process's life.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                result = pool.apply(task, (Path(folder), *inputs))
    return dict(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="f16", choices=("f16", "q8_0", "f32"))
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=64_000)
    chosen = vars(parser.parse_args())
    print(json.dumps({**chosen, **measure(**chosen)}))


if __name__ == "__main__":
    main()
