"""Planned against measured memory for a grid of settings, each run in its own process.

    python benchmarks/plan_memory.py                                  # SmolLM2, two cores, minutes
    python benchmarks/plan_memory.py --only lora-4x128 full-4x128     # a part of the grid
    python benchmarks/plan_memory.py --device cuda                    # random models on a GPU
    python benchmarks/plan_memory.py --again FILE.jsonl      # today's plans of measured GPU runs

Each process trains for two steps through `lora.finetune` and reports the memory planned before the
weights were read and the memory measured at the end. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from lora.config import BaseDtype, TrainConfig

WORDS = ("order", "town", "sea", "nobody", "asked", "small", "near", "where", "sent", "had")


@dataclass(frozen=True)
class Case:
    """One setting of the grid."""

    rows: int
    tokens: int
    rank: int | None = 8
    """None: full fine-tuning."""
    micro_batches: int = 1
    packing: bool = True
    shape: str = "smollm2"
    fast: bool = True
    implementation: Literal["auto", "transformers"] = "auto"
    base: BaseDtype = "auto"


ON_CPU = {
    "lora-1x128": Case(1, 128),
    "lora-4x128": Case(4, 128),
    "lora-4x128-rank64": Case(4, 128, rank=64),
    "lora-8x128-unpacked": Case(8, 128, packing=False),
    "lora-2x512": Case(2, 512),
    "lora-8x128-in-4": Case(8, 128, micro_batches=4),
    "lora-1x1024": Case(1, 1024),
    "nf4-lora-1x128": Case(1, 128, base="nf4"),
    "nf4-lora-4x128": Case(4, 128, base="nf4"),
    "nf4-lora-2x512": Case(2, 512, base="nf4"),
    "fp8-lora-4x128": Case(4, 128, base="fp8"),
    "int8-lora-4x128": Case(4, 128, base="int8"),
    "wide-nf4-lora-4x128": Case(4, 128, shape="wide", base="nf4"),
    "full-1x128": Case(1, 128, rank=None),
    "full-4x128": Case(4, 128, rank=None),
    "full-4x128-in-2": Case(4, 128, rank=None, micro_batches=2),
    "wide-lora-4x128": Case(4, 128, shape="wide"),
    "wide-full-4x128": Case(4, 128, rank=None, shape="wide"),
    "gemma3-lora-4x128": Case(4, 128, shape="gemma3"),
    "transformers-lora-4x128": Case(4, 128, shape="wide", implementation="transformers"),
    "transformers-full-4x128": Case(4, 128, rank=None, shape="wide", implementation="transformers"),
    "transformers-gemma3-4x128": Case(4, 128, shape="gemma3", implementation="transformers"),
}
ON_GPU = {
    "lora-4x512": Case(4, 512, shape="135M"),
    "lora-16x512-rank64": Case(16, 512, rank=64, shape="135M"),
    "full-4x512": Case(4, 512, rank=None, shape="135M"),
    "lora-8x512-in-4": Case(8, 512, micro_batches=4, shape="135M"),
    "plain-lora-4x512": Case(4, 512, shape="135M", fast=False),
    "plain-full-4x512": Case(4, 512, rank=None, shape="135M", fast=False),
    "qwen3-lora-4x512": Case(4, 512, shape="qwen3"),
    "gemma3-lora-4x512": Case(4, 512, shape="gemma3"),
    "transformers-lora-4x512": Case(4, 512, shape="135M", implementation="transformers"),
    "1B-lora-1x512": Case(1, 512, rank=16, shape="1B"),
    "1B-lora-4x2048": Case(4, 2048, rank=16, shape="1B"),
    "nf4-lora-4x512": Case(4, 512, shape="135M", base="nf4"),
    "plain-nf4-lora-4x512": Case(4, 512, shape="135M", fast=False, base="nf4"),
    "1B-nf4-lora-4x2048": Case(4, 2048, rank=16, shape="1B", base="nf4"),
    "1B-full-1x512": Case(1, 512, rank=None, shape="1B"),
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256},
    "wide": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6,
             "num_attention_heads": 16, "num_key_value_heads": 4},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3},
    "qwen3": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 16,
              "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64,
              "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "gemma3": {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 12,
               "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
               "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"],
               "sliding_window": 64, "rope_local_base_freq": 10000.0, "vocab_size": 65536,
               "query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh"},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
COMMON = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5,
          "rope_theta": 10000.0, "max_position_embeddings": 4096, "tie_word_embeddings": True,
          "vocab_size": 49152, "hidden_act": "silu"}  # fmt: skip


def make_folder(shape: str, folder: Path) -> str:
    """Return a model's folder with random bf16 weights of this shape and a tokenizer of words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    from lora.data.tokenizers.subword import TextTokenizer
    from lora.decoder.decoder import assign_parameters, build_empty_decoder
    from lora.decoder.families import decoder_config
    from lora.pretrained.hf_weights import save_decoder

    values = {**COMMON, **SHAPES[shape]}
    model = build_empty_decoder(decoder_config(values))
    shapes = [(name, p.shape) for name, p in model.named_parameters()]
    drawn = [(n, torch.randn(s, dtype=torch.bfloat16).mul_(0.02)) for n, s in shapes]
    assign_parameters(model, drawn)
    save_decoder(model, folder)
    (folder / "config.json").write_text(json.dumps(values))
    vocabulary = {word: n for n, word in enumerate(["<end>", *dict.fromkeys(WORDS)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    TextTokenizer(backend, eos_token="<end>", pad_token="<end>").save(folder)
    return str(folder)


def make_texts(case: Case, n_tokens: int) -> list[dict[str, Any]]:
    """Return texts of many lengths, so that sequences are packed or padded as real ones are."""
    draw, texts, n_made = random.Random(0), [], 0
    while n_made < n_tokens:
        n = draw.randint(case.tokens // 4, case.tokens - 2)
        texts.append({"text": " ".join(draw.choices(WORDS, k=n))})
        n_made += n
    return texts


def train_config(case: Case) -> TrainConfig:
    """Return the training settings of `case`."""
    from lora.config import TrainConfig

    return TrainConfig(steps=2, batch_size=case.rows, gradient_accumulation=case.micro_batches)


def run_child(case: Case, device: str) -> dict[str, Any]:
    """Return the memory that `lora.finetune` planned and measured, in this process."""
    from lora.config import DataConfig, LoRAConfig, RunConfig
    from lora.finetune import FinetuneJob, finetune

    with tempfile.TemporaryDirectory() as folder:
        model = None
        if case.shape != "smollm2":
            model = str(
                Path(folder) / "model"
            )  # in a subprocess: this process's memory is measured
            command = [sys.executable, __file__, "--make", case.shape, model]
            subprocess.run(command, check=True)
        job = FinetuneJob(
            data=make_texts(case, 8 * case.rows * case.tokens),
            model=model,
            lora=None if case.rank is None else LoRAConfig(rank=case.rank),
            train=train_config(case),
            data_config=DataConfig(max_length=case.tokens, packing=case.packing),
            implementation=case.implementation,
            base_dtype=case.base,
            run=RunConfig(
                out=Path(folder), name="run", device=device, samples=0, fast=case.fast,
                save_every_steps=1000,
            ),
        )  # fmt: skip
        return finetune(job).memory.to_dict()


def plan_again(case: Case) -> int:
    """Return the bytes planned now for a GPU case; needs no GPU."""
    import torch

    from lora.config import BaseWeights, LoRAConfig
    from lora.decoder.families import decoder_config
    from lora.fast.memory.plan import PlanInputs
    from lora.fast.memory.planner import plan_memory

    setting = PlanInputs(
        config=decoder_config({**COMMON, **SHAPES[case.shape]}),
        lora=None if case.rank is None else LoRAConfig(rank=case.rank),
        micro_batch_size=train_config(case).micro_batch_size,
        tokens=case.tokens,
        device_type="cuda",
        compute_dtype=torch.bfloat16,
        micro_batches=case.micro_batches,
        fast=case.fast,
        base=BaseWeights(case.base),
    )
    return plan_memory(setting).total


def measure(name: str, device: str) -> dict[str, Any]:
    """Return the row of one setting, run in a subprocess."""
    command = [sys.executable, __file__, "--child", name, "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"case": name, "failed": (done.stderr.strip().splitlines() or ["?"])[-1][:300]}
    return {"case": name, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    """Measure the grid or a part of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=[*ON_CPU, *ON_GPU])
    parser.add_argument("--out", type=Path, help="also append the lines to this file")
    parser.add_argument("--again", type=Path, help="plan the runs in this file again")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    grid = ON_GPU if arguments.device == "cuda" else ON_CPU
    if arguments.make:
        make_folder(arguments.make[0], Path(arguments.make[1]))
        return
    if arguments.child:
        print(json.dumps(run_child(grid[arguments.child], arguments.device)))
        return
    if arguments.again:
        for line in arguments.again.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            total = plan_again(ON_GPU[row["case"]])
            off = round(total / row["measured_bytes"] - 1, 4)
            print(json.dumps({**row, "planned_now": total, "error_fraction_now": off}), flush=True)
        return
    for name in arguments.only or grid:
        row = measure(name, arguments.device)
        print(json.dumps(row), flush=True)
        if arguments.out:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
