"""A training step of SmolLM2-135M on a CPU over a base in fp32, fp8, int8 and nf4; their memory.

    python benchmarks/cpu_quantised.py                   # 4x128 and 1x512 tokens, ten minutes
    python benchmarks/cpu_quantised.py --rounds 3 --only 4x128

Steps alternate in one process, so that a change of the machine's speed affects all variants; the
first round is not counted. Memory is the peak of a subprocess that loads the model and takes two
steps, above what it held before. PEFT with bitsandbytes is QLoRA as others run it, in fp32 as ours.
Prints JSON lines; needs transformers, peft, accelerate and bitsandbytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from smollm2_step import full_logits_loss, random_batch
from torch import Tensor, nn

from lora.adapters.apply import apply_lora
from lora.config import BaseWeights, LoRAConfig
from lora.data.sequences.batches import Batch
from lora.device import peak_memory_bytes, resident_bytes
from lora.pretrained.hf_weights import load_decoder
from lora.pretrained.sources import find_model
from lora.training.heap import retain_freed_memory
from lora.training.losses import loss_for
from lora.training.optim import build_optimizer
from lora.training.plain_step import train_step

RANK = 8
CASES = {"4x128": (4, 128), "1x512": (1, 512)}
KINDS = {"fp32": "auto", "fp8": "fp8", "int8": "int8", "nf4": "nf4"}
PEFT = "PEFT + bitsandbytes, nf4"
VARIANTS = (*KINDS, PEFT)

Loss = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]


def build(variant: str, folder: Path) -> tuple[nn.Module, Loss]:
    """Return the model of a variant with LoRA on all linears, and its loss function."""
    if variant == PEFT:
        return peft_over_bitsandbytes(folder), full_logits_loss
    base = BaseWeights(KINDS[variant])  # type: ignore[arg-type]
    model = apply_lora(load_decoder(folder, base=base), LoRAConfig(rank=RANK))
    return model, loss_for(model)


def peft_over_bitsandbytes(folder: Path) -> Any:
    """Return transformers' model in bitsandbytes' nf4 with PEFT's LoRA, computing in fp32."""
    import peft
    import transformers

    stored = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    settings = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.LlamaForCausalLM.from_pretrained(
            folder, quantization_config=stored, dtype=torch.float32, device_map="cpu"
        )
        return peft.get_peft_model(model, settings)


def time_steps(case: str, folder: Path, rounds: int) -> dict[str, float]:
    """Return by variant the median seconds of a step."""
    built = {variant: build(variant, folder) for variant in VARIANTS}
    optimizers = {name: build_optimizer(model, 1e-4, 0.0) for name, (model, _) in built.items()}
    batch = random_batch(*CASES[case])
    seconds: dict[str, list[float]] = {name: [] for name in built}
    with retain_freed_memory():  # as in a run
        for _ in range(rounds + 1):
            for name, (model, loss_fn) in built.items():
                began_s = time.perf_counter()
                train_step(model, [batch], loss_fn, optimizers[name])
                seconds[name].append(time.perf_counter() - began_s)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def measure_memory(case: str, variant: str, folder: Path) -> int:
    """Return the peak bytes of this process while it loads and trains, above what it held."""
    if variant == PEFT:  # imports are not the model's memory
        import bitsandbytes
        import peft

        assert bitsandbytes
        assert peft
    before = resident_bytes()
    model, loss_fn = build(variant, folder)
    optimizer = build_optimizer(model, 1e-4, 0.0)
    for _ in range(2):
        train_step(model, [random_batch(*CASES[case])], loss_fn, optimizer)
    return peak_memory_bytes(torch.device("cpu")) - before


def main() -> None:
    """Print a line for each case and variant."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=CASES, nargs="*", default=list(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "VARIANT"), help="used inside")
    arguments = parser.parse_args()
    folder = find_model().folder
    if arguments.memory_of is not None:
        print(measure_memory(*arguments.memory_of, folder))
        return
    for case in arguments.only:
        peaks = {}
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--memory-of", case, variant]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[variant] = int(done.stdout.split()[-1])
        for variant, median_s in (times := time_steps(case, folder, arguments.rounds)).items():
            row = {
                "case": f"SmolLM2-135M {case} rank {RANK}",
                "base": variant,
                "step_ms": round(1000 * median_s),
                "against_fp32": round(median_s / times["fp32"], 2),
                "peak_mb": round(peaks[variant] / 1e6),
                "threads": torch.get_num_threads(),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
