"""Tokens a second on SmolLM2-135M, with a cache: ours beside transformers' generate.

    python benchmarks/cpu_generate.py
    python benchmarks/cpu_generate.py --out benchmarks/results/cpu_generate.jsonl

Greedy, fp32, prompts of 64 random tokens, the same weights; both take turns in one process and the
median counts, the first round does not. Needs transformers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from lora.config import SamplingConfig
from lora.decoder.hf_weights import load_decoder
from lora.decoder.sources import find_model
from lora.generate import generate

PROMPT_TOKENS = 64


def measure(batch_size: int, new_tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return the median tokens a second of both, and the share of tokens on which they agree."""
    import transformers

    folder = find_model().folder
    ours = load_decoder(folder)
    theirs: Any = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 40000, (batch_size, PROMPT_TOKENS), generator=draw)
    sampling = SamplingConfig(max_new_tokens=new_tokens)
    exactly = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}
    mask = torch.ones_like(ids)
    prompts = ids.tolist()

    def their_answers() -> list[list[int]]:
        with torch.inference_mode():
            made = theirs.generate(
                ids, attention_mask=mask, use_cache=True, pad_token_id=0, **exactly
            )
        answers: list[list[int]] = made[:, PROMPT_TOKENS:].tolist()
        return answers

    runs: dict[str, Callable[[], list[list[int]]]] = {
        "transformers": their_answers,
        "ours": lambda: generate(ours, prompts, sampling),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    answers = {}
    for number in range(rounds + 1):
        for name, run in runs.items():
            began_s = time.perf_counter()
            answers[name] = run()
            if number:
                seconds[name].append(time.perf_counter() - began_s)
    count = batch_size * new_tokens
    pairs = zip(sum(answers["ours"], []), sum(answers["transformers"], []), strict=True)
    agreement = sum(a == b for a, b in pairs) / count
    return {
        name: {"tokens_per_s": count / statistics.median(times), "agreement": agreement}
        for name, times in seconds.items()
    }


def main() -> int:
    """Measure batches of 1 and 8 and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also append JSON lines to this file")
    arguments = parser.parse_args()
    for batch_size in arguments.batches:
        results = measure(batch_size, arguments.new_tokens, arguments.rounds)
        rows = []
        for name, result in results.items():
            rate = result["tokens_per_s"]
            times = rate / results["transformers"]["tokens_per_s"]
            print(f"batch {batch_size}  {name:<13}{rate:8.1f} tokens/s  {times:.2f}x", flush=True)
            row = {"batch": batch_size, "variant": name, "tokens_per_s": round(rate, 1)}
            row |= {"against_transformers": round(times, 2), "agreement": result["agreement"]}
            rows.append({**row, "threads": torch.get_num_threads(), "torch": torch.__version__})
        if arguments.out:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
